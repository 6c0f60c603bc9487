"""Arrays and a manifest in one .npz whose bytes depend only on its contents.

Members are stored uncompressed, with a fixed date, in the given order. Reading trusts nothing: no
pickle, no compression (so that a small file cannot expand), and all checksums are verified.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from qcompile.errors import DataError
from qcompile.quant import Array

_MANIFEST = "manifest.json"
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold
_UNIX = 3
# What numpy and zipfile raise on damaged or hostile files.
_FAULTS = (
    AttributeError, EOFError, KeyError, MemoryError, NotImplementedError, OSError, OverflowError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def write_archive(
    file: IO[bytes], manifest: Mapping[str, Any], arrays: Iterable[tuple[str, Array]]
) -> None:
    """Write to a binary stream: keys of the manifest sorted, named arrays in their order."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        text = json.dumps(manifest, sort_keys=True, indent=1)
        archive.writestr(_member(_MANIFEST), text)
        for name, values in arrays:
            with archive.open(_member(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.create_system = _UNIX  # else the platform's
    info.external_attr = 0o644 << 16
    return info


def read_archive(path: Path, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Array]]:
    """Manifest and arrays of a file whose manifest names this format and version.

    Raises DataError: missing, another format or version, truncated, damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path.stat().st_size)
            manifest = json.loads(archive.read(_MANIFEST))
            if manifest["format"] != kind:
                raise ValueError(f"its format is {manifest['format']!r}")
            if manifest["version"] != version:
                raise ValueError(f"its version is {manifest['version']!r}, expected {version}")
            names = [n for n in archive.namelist() if n.endswith(".npy")]
            return manifest, {n.removesuffix(".npy"): _array(archive, n) for n in names}
    except _FAULTS as e:
        message = (str(e) or type(e).__name__).splitlines()[0]
        raise DataError(f"{str(path)!r} cannot be read as a {kind}: {message}") from e


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise ValueError("it is compressed, which this format is not")
    if sum(m.file_size for m in members) > size:
        raise ValueError("its members claim more bytes than it has")


def _array(archive: zipfile.ZipFile, name: str) -> Array:
    raw = archive.read(name)  # raises where the checksum is wrong
    values: Array = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    return values
