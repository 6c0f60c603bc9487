"""Which files a path, a pattern or an address names, and what is refused with one line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcompile.data.streams.stream_files import files_of
from qcompile.errors import DataError

fsspec: Any = pytest.importorskip("fsspec")
pytest.importorskip("pyarrow")


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty file system in memory."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(data: str | Path) -> list[str]:
    return [Path(file.name).name for file in files_of(data)]


def test_other_data_is_no_stream(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b.jsonl", "c.csv", "d.npz", "arrays/e.npz")
    for name in ("a.txt", "b.jsonl", "c.csv", "d.npz", "arrays", "missing.parquet"):
        assert files_of(tmp_path / name) == []
    assert files_of("package.module:function") == []


def test_formats_are_known_by_their_endings(tmp_path: Path) -> None:
    names = ("a.parquet", "b.arrow", "c.jsonl.gz", "d.csv.zst", "e.TXT.GZ", "f.v2.txt.gz")
    put(tmp_path, *names)
    for name, expected in zip(
        names,
        [
            (".parquet", ""),
            (".arrow", ""),
            (".jsonl", ".gz"),
            (".csv", ".zst"),
            (".txt", ".gz"),
            (".txt", ".gz"),
        ],
        strict=True,
    ):
        (file,) = files_of(tmp_path / name)
        assert (file.format, file.compression) == expected


def test_a_pattern_gives_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    put(tmp_path, "p-10.jsonl", "p-9.jsonl", "p-1.jsonl.gz", ".p-2.jsonl", "sub/p-3.jsonl", "x.txt")
    (tmp_path / "p-7.jsonl").mkdir()
    assert found(tmp_path / "p-*") == ["p-1.jsonl.gz", "p-9.jsonl", "p-10.jsonl"]
    assert found(f"{tmp_path}/**/*.jsonl") == ["p-9.jsonl", "p-10.jsonl", "p-3.jsonl"]
    assert found(f"{tmp_path}/.p*") == [".p-2.jsonl"]
    assert found(f"{tmp_path}/p-?.jsonl") == ["p-9.jsonl"]


def test_a_name_with_a_bracket_is_a_file(tmp_path: Path) -> None:
    put(tmp_path, "a[1].jsonl.gz")
    assert found(tmp_path / "a[1].jsonl.gz") == ["a[1].jsonl.gz"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.jsonl", "no file matches"),
        ("*", "x.bin is of no known format, expected .arrow, .parquet, or .csv, .jsonl, .txt"),
        ("**.txt", "cannot be read: Invalid pattern"),
    ],
)
def test_patterns_that_give_nothing_are_refused(pattern: str, said: str, tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "x.bin")
    if pattern == "**.txt" and sys.version_info >= (3, 13):
        pytest.skip("there ** within a name is *")
    with pytest.raises(DataError, match=said.replace("*", r"\*")):
        files_of(f"{tmp_path}/{pattern}")


def test_a_dataset_lists_its_files(tmp_path: Path) -> None:
    put(tmp_path, "b.arrow", "a.arrow", "other.arrow")
    entries = [{"filename": "b.arrow"}, {"filename": "a.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": entries}))
    assert found(tmp_path) == ["b.arrow", "a.arrow"]


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("dataset_dict.json", '{"splits": ["train", "test"]}', "the splits train, test: give"),
        ("state.json", '{"_data_files": []}', "lists no data files"),
        ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', "lists no data files"),
        ("state.json", '{"_data_files": [3]}', "lists no data files"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow does not ex"),
        ("state.json", '{"_indices_data_files": [{}]}', r"save it again by flatten_indices\(\)"),
        ("state.json", "[]", "state.json holds list, expected an object"),
        ("state.json", "no", "state.json cannot be read: Expecting value"),
    ],
)
def test_folders_that_are_no_dataset(name: str, contents: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(contents)
    with pytest.raises(DataError, match=said):
        files_of(tmp_path)


def test_addresses(memory: Any) -> None:
    for name in ("/data/p-10.parquet", "/data/p-9.parquet", "/data/a.txt"):
        memory.pipe(name, b"")
    assert found("memory://data/*.parquet") == ["p-9.parquet", "p-10.parquet"]
    assert found("memory://data/a.txt") == ["a.txt"]  # a stream, as any address
    memory.pipe("/set/state.json", b'{"_data_files": [{"filename": "x.arrow"}]}')
    memory.pipe("/set/x.arrow", b"")
    assert found("memory://set") == ["x.arrow"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://data/none.parquet", "none.parquet does not exist"),
        ("memory://data/*.csv", "no file matches 'memory://data/.*csv'"),
        ("memory://data", r"is a folder, but none .* as in 'memory://data/\*.parquet'"),
        ("memory://data/x.npz", "x.npz is of no known format"),
        ("unknown://data/x.parquet", "Protocol not known: unknown"),
    ],
)
def test_addresses_that_give_nothing(address: str, said: str, memory: Any) -> None:
    memory.pipe("/data/x.npz", b"")
    with pytest.raises(DataError, match=said):
        files_of(address)


def test_a_query_does_not_hide_the_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.data.streams import stream_files

    assert stream_files._format("https://host/x.parquet?download=true") == (".parquet", "")


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def info(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", info)


class NoCredentialsError(Exception):
    """As of botocore."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoCredentialsError("Unable to locate them"), "locate them: give credentials where"),
        (PermissionError("denied"), "denied: give credentials where"),
        (ConnectionError("no route"), "cannot be read: no route$"),
        (ValueError("no range requests\nmore"), "simplecache::memory:///x.txt downloads it first"),
        (RuntimeError(), "cannot be read: RuntimeError$"),
    ],
)
def test_failures_of_a_server_are_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(DataError, match=said) as caught:
        files_of("memory://x.txt")
    assert "\n" not in str(caught.value)


def test_memory_errors_and_interrupts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, MemoryError())
    with pytest.raises(MemoryError):
        files_of("memory://x.txt")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"class": "s3fs.S3FileSystem", "err": "Install s3fs to access S3"}
    monkeypatch.setitem(sys.modules, "s3fs", None)
    registry: Any = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry.known_implementations, "s3", known)
    with pytest.raises(DataError, match="s3fs to access S3: pip install s3fs"):
        files_of("s3://bucket/x.parquet")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"memory://x.txt needs fsspec: pip install -e '.\[data\]'"):
        files_of("memory://x.txt")
