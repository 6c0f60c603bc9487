"""Rows are read by number from files of any size; what cannot be used is one line."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompile.errors import DataError
from qcompile.training.labelled.labelled_rows import LabelledRows, Row


def rows_of(path: Path, check: Callable[[Row, str], int] = lambda row, where: 1) -> LabelledRows:
    return LabelledRows(path, check)


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


TABLE = '\ufefftext,label\r\nplain,1\r\n"with, comma",2\r\n\r\n"two\nlines ""quoted""",3\r\nlast,4'
LINES = '\ufeff{"text": "é"}\n\n  \n{"text": "b"}\r\n{"text": "c"}'


def test_any_order_of_rows_can_be_read(tmp_path: Path) -> None:
    found = rows_of(written(tmp_path, "a.csv", TABLE))
    texts = [row["text"] for row, _ in found.read([3, 2, 1, 0, 2])]
    two = 'two\nlines "quoted"'
    assert len(found) == 4 and texts == ["last", two, "with, comma", "plain", two]
    found = rows_of(written(tmp_path, "a.JSONL", LINES))
    assert [row["text"] for row, _ in found.read([2, 0, 1])] == ["c", "é", "b"]
    found = rows_of(written(tmp_path, "a.txt", "one\n\n two "))
    assert [row for row, _ in found.read([1, 0])] == [{"text": "two"}, {"text": "one"}]


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    for name, text in (("a.csv", TABLE), ("a.jsonl", LINES)):
        path = written(tmp_path, name, text)
        assert rows_of(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_row_may_have_several_samples(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "1\n3\n")
    found = rows_of(path, lambda row, where: int(row["text"]))
    assert [part for _, part in found.read(range(len(found)))] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: found list, expected an object"),
        ("a.jsonl", b'{"text": "a"}\n\xff\xfe\n', "line 2: not UTF-8"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "text,label\nyes, it is,1\n", "line 2: more fields than the header's 2"),
        ("a.csv", 'text,label\nok,1\n"open,1\n', "line 3: not CSV"),
        ("a.csv", "text\n" + "x" * 200_000, "line 2: not CSV: field larger"),
        ("a.txt", "x" * ((1 << 20) + 1), "line 1: over 1048576 bytes"),
        ("a.parquet", "x", "no known format, expected .csv, .jsonl, .txt"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(written(tmp_path, name, text))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        rows_of(tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        rows_of(tmp_path / "b.csv")


def test_a_row_that_the_check_refuses_is_named(tmp_path: Path) -> None:
    def check(row: Row, where: str) -> int:
        raise ValueError("empty text")

    with pytest.raises(DataError, match=r"a.csv, line 2: empty text$"):
        rows_of(written(tmp_path, "a.csv", "text\nx\n"), check)


@pytest.mark.parametrize("text", ["", '{"text": "a"}\n{"te'])
def test_a_file_that_changes_is_an_error(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    found = rows_of(path)
    path.write_text(text)
    with pytest.raises(DataError, match="has changed since it was first read"):
        found.read([1])


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        line = json.dumps({"text": "a" * 100}) + "\n"
        path.write_text(line * count)
        tracemalloc.start()
        found = rows_of(path)
        found.read(range(count - 10, count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(5_000), peak(20_000)
    assert many < few + 100_000  # index entries of 15,000 more rows are 180 kB
