"""Which files a path, a pattern or an address names, and in which formats they are.

| data | files |
|---|---|
| ``x.parquet``, ``x.arrow``, ``x.jsonl.gz``, ``x.csv.zst`` | the file |
| ``folder/*.jsonl``, ``folder/**/*.parquet`` | those that match, in the order of names |
| a folder that ``save_to_disk`` of datasets wrote | those that its state.json lists |
| ``s3://…``, ``gs://…``, ``https://…`` | any of these, also a single .txt, .jsonl or .csv file |

In the order of names, numbers count as numbers: part-9 comes before part-10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from qcompile.data.streams.storage import (
    LocalStorage,
    RemoteStorage,
    Storage,
    StoredFile,
    has_magic,
    is_address,
    readable,
)
from qcompile.data.text import FORMATS
from qcompile.errors import DataError

COLUMNAR = (".arrow", ".parquet")
COMPRESSED = (".gz", ".zst")
EXPECTED = (
    f"expected {', '.join(COLUMNAR)}, or {', '.join(FORMATS)}, which may end in "
    f"{' or '.join(COMPRESSED)}"
)
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of a Dataset, and of a DatasetDict
_MOST_STATE = 1 << 24  # bytes


@dataclass(frozen=True)
class StreamFile:
    """A file of a stream. format: its ending without compression. compression: .gz, .zst or ""."""

    stored: StoredFile
    format: str
    compression: str

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def is_columnar(self) -> bool:
        """Whether its columns have names and types of their own, so that it is no text."""
        return self.format in COLUMNAR


def files_of(data: str | Path) -> list[StreamFile]:
    """The files that this names, in their order; none where it names no stream.

    Raises DataError for a stream that is not there, and for files of unknown formats.
    """
    if isinstance(data, str) and is_address(data):
        remote = RemoteStorage(data)
        return _remote_files(data, remote, remote.root)
    path, local = str(data), LocalStorage()
    if local.is_file(path):
        file = _known(local.file(path))
        is_stream = file is not None and (file.is_columnar or file.compression)
        return [file] if file is not None and is_stream else []
    if local.is_folder(path):
        return _dataset_files(path, local)
    return _matching(path, local, path) if has_magic(path) else []


def _remote_files(address: str, storage: RemoteStorage, path: str) -> list[StreamFile]:
    if "*" in path or "[" in path:  # a ? separates the query of an address
        return _matching(address, storage, path)
    if _format(address) is None and storage.is_folder(path):
        files = _dataset_files(path, storage)
        if not files:
            raise DataError(
                f"{address} is a folder, but none that save_to_disk of datasets wrote: "
                f"name its files, as in '{address.rstrip('/')}/*.parquet'"
            )
        return files
    return [_checked(storage.file(path))]


def _matching(pattern: str, storage: Storage, path: str) -> list[StreamFile]:
    found = [_checked(storage.file(one)) for one in sorted(storage.match(path), key=_by_number)]
    if not found:
        raise DataError(f"no file matches {pattern!r}")
    return found


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Compares the numbers in names as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(p), p) if i % 2 else (1, 0, p) for i, p in enumerate(parts)]


def _checked(stored: StoredFile) -> StreamFile:
    file = _known(stored)
    if file is None:
        raise DataError(f"{stored.name} is of no known format, {EXPECTED}")
    return file


def _known(stored: StoredFile) -> StreamFile | None:
    found = _format(stored.name)
    return StreamFile(stored, *found) if found is not None else None


def _format(name: str) -> tuple[str, str] | None:
    """Format and compression by the ending of a name; None where they are not known."""
    path = urlsplit(name).path if is_address(name) else name
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    known: Sequence[str] = FORMATS if compression else (*FORMATS, *COLUMNAR)
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in known else None


def _dataset_files(folder: str, storage: Storage) -> list[StreamFile]:
    """The files of a folder that save_to_disk wrote; none for other folders."""
    if storage.is_file(f"{folder}/{_SPLITS}"):
        splits = _read_json(storage.file(f"{folder}/{_SPLITS}")).get("splits")
        named = ", ".join(map(str, splits)) if isinstance(splits, list) and splits else "none"
        raise DataError(f"{folder} holds the splits {named}: give the folder of one of them")
    if not storage.is_file(f"{folder}/{_STATE}"):
        return []
    state = _read_json(storage.file(f"{folder}/{_STATE}"))
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} is a selection of rows: save it again by flatten_indices()")
    listed = state.get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) and _is_inside(name) for name in names):
        raise DataError(f"{folder}/{_STATE} lists no data files, expected those of save_to_disk")
    return [StreamFile(storage.file(f"{folder}/{name}"), ".arrow", "") for name in names]


def _is_inside(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _read_json(stored: StoredFile) -> dict[str, object]:
    with readable(stored.name), stored.open_binary() as file:
        found = json.loads(file.read(_MOST_STATE))
    if not isinstance(found, dict):
        raise DataError(f"{stored.name} holds {type(found).__name__}, expected an object")
    return found
