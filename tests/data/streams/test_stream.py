"""The same rows in any format and split give the same sample; what is no text is one line."""

from __future__ import annotations

import gzip
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qcompile.data.streams.stream import Stream, Texts, open_stream, sampled_texts
from qcompile.errors import DataError

pytest.importorskip("pyarrow")
files: Any = pytest.importorskip("tests.stream_files")
FORMATS = ("parquet", "arrow", "jsonl.gz", "jsonl.zst", "csv.gz", "csv.zst", "txt.gz", "txt.zst")


def opened(data: str | Path, progress: Any = None) -> Stream:
    stream = open_stream(data, progress)
    assert stream is not None
    return stream


def drawn(data: str | Path, size: int = 9, seed: int = 0, columns: tuple[str, ...] = ()) -> Texts:
    sampled_texts.cache_clear()
    return sampled_texts(opened(data), size, seed, columns)


def written(folder: Path, ending: str, parts: Sequence[Any]) -> str:
    for number, rows in enumerate(parts):
        files.write(folder / f"part-{number}.{ending}", rows)
    return f"{folder}/part-*.{ending}"


@pytest.fixture
def expected(tmp_path: Path) -> Texts:
    return drawn(files.write(tmp_path / "expected.parquet", files.texts(600)))


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_and_split_gives_the_same_sample(
    ending: str, expected: Texts, tmp_path: Path
) -> None:
    rows = files.texts(600)
    assert len(expected.texts) == 9 and expected.note == "9 of 600 rows were drawn, with seed 0"
    assert drawn(files.write(tmp_path / f"one.{ending}", rows, group=600)) == expected
    cuts = [0, 5, 6, 50, 599, 600]
    parts = [rows[a:b] for a, b in pairwise(cuts)]
    assert drawn(written(tmp_path / "split", ending, parts)) == expected


def test_plain_files_of_a_pattern_and_datasets_too(expected: Texts, tmp_path: Path) -> None:
    rows = files.texts(600)
    parts = [rows[i : i + 50] for i in range(0, 600, 50)]  # part-10 comes after part-9
    for ending in ("jsonl", "txt", "csv"):
        assert drawn(written(tmp_path / ending, ending, parts)) == expected
    assert drawn(files.write_dataset(tmp_path / "set", parts)) == expected
    path = tmp_path / "file.arrow"
    files.write_arrow(path, rows, 11, files.pa.ipc.new_file)
    assert drawn(path) == expected


def test_a_sample_is_in_the_order_of_the_stream_and_of_its_seed(tmp_path: Path) -> None:
    path = files.write(tmp_path / "x.txt.gz", files.texts(600))
    numbers = [int(text[1:]) for (text,) in drawn(path).texts]
    assert numbers == sorted(numbers) and numbers[-1] > 300
    assert drawn(path) == drawn(path) != drawn(path, seed=1)
    whole = drawn(path, size=600)
    assert whole.note is None and whole.texts == tuple((f"t{i}",) for i in range(600))


def test_pairs_words_and_named_columns(tmp_path: Path) -> None:
    pair = {"text_a": "a", "text_b": "b", "q": "c", "id": 7}
    for name in ("x.parquet", "x.jsonl.gz", "x.csv.gz"):
        path = files.write(tmp_path / name, [pair])
        assert drawn(path).texts == (("a", "b"),)
        assert drawn(path, columns=("q",)).texts == (("c",),)
        assert drawn(path, columns=("q", "text_a")).texts == (("c", "a"),)
    words = files.write(tmp_path / "w.parquet", [{"tokens": ["a", "b"], "tags": [0, 1]}])
    assert drawn(words).texts == (("a b",),)


def test_only_text_columns_are_read(tmp_path: Path) -> None:
    """The types of other columns do not matter, and row groups without drawn rows are not read."""
    path = files.write(tmp_path / "x.parquet", [{"text": "a", "blob": b"\x00" * 99}] * 50)
    read: list[Any] = []

    def choose(names: Sequence[str], where: str) -> list[str]:
        read.append((list(names), where))
        return ["text"]

    sample = opened(path).sample(2, 0, choose)
    assert read == [(["text", "blob"], str(path))]
    assert [row.read() for row in sample.rows] == [{"text": "a"}] * 2


def test_row_groups_without_drawn_rows_are_not_read(tmp_path: Path) -> None:
    path = files.write(tmp_path / "x.parquet", files.texts(700), group=7)
    whole = drawn(path, size=1)
    contents = bytearray(path.read_bytes())
    contents[4:40] = b"\xff" * 36  # the first row group, of which nothing is kept in the end
    path.write_bytes(contents)
    with pytest.raises(DataError, match=r"x\.parquet cannot be read"):
        drawn(path, size=700)
    with pytest.raises(DataError, match=r"x\.parquet cannot be read"):
        drawn(path, size=1)  # its row was drawn when nothing else was known
    assert int(whole.texts[0][0][1:]) > 7


BAD = [
    ("x.parquet", [{"q": "a", "label": 1}], "x.parquet: no field 'text', or .* found q, label"),
    ("x.jsonl.gz", [{"q": "a", "label": 1}], "x.jsonl.gz, line 1: no field .* found q, label"),
    ("x.csv.zst", [{"q": "a", "label": 1}], "x.csv.zst, line 2: no field .* found q, label"),
    ("x.arrow", [{"text": 3}], "x.arrow, row 0: field 'text' is int, expected a string"),
    ("x.parquet", [{"text": "a"}, {"text": None}], "x.parquet, row 1: field 'text' is empty"),
    ("x.jsonl.gz", [{"text": "a"}, {"text": 3}], "x.jsonl.gz, line 2: field 'text' is int"),
    ("x.jsonl.gz", [{"text": "a" * (1 << 20)}], "x.jsonl.gz, line 1: over 1048576 characters"),
]


@pytest.mark.parametrize(("name", "rows", "said"), BAD)
def test_rows_that_are_no_text_are_named(name: str, rows: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        drawn(files.write(tmp_path / name, rows))


def test_rows_count_from_their_own_file(tmp_path: Path) -> None:
    parts = [[{"text": f"a{i}"} for i in range(50)], [{"text": "b"}] * 20 + [{"text": None}]]
    with pytest.raises(DataError, match=r"part-1\.parquet, row 20: field 'text' is empty"):
        drawn(written(tmp_path, "parquet", parts), size=99)
    with pytest.raises(DataError, match=r"part-1\.jsonl\.gz, line 21: field 'text' is empty"):
        drawn(written(tmp_path, "jsonl.gz", parts), size=99)


def test_a_column_that_a_later_file_lacks_is_found_at_once(tmp_path: Path) -> None:
    for ending in ("parquet", "jsonl.gz"):
        pattern = written(tmp_path, ending, [[{"text": "a"}] * 600, [{"other": "b"}] * 600])
        with pytest.raises(DataError, match=r"part-1.*no field 'text', or .*; found other"):
            drawn(pattern, size=1)


DAMAGED = [
    ("x.jsonl.gz", slice(0, 400), "ended before the end-of-stream marker"),
    ("x.jsonl.zst", slice(0, 400), "Truncated compressed stream"),
    ("x.parquet", slice(0, 400), "Parquet magic bytes not found"),
    ("x.arrow", slice(0, 900), "Expected to"),
]


@pytest.mark.parametrize(("name", "kept", "said"), DAMAGED)
def test_truncated_files_are_one_line(name: str, kept: slice, said: str, tmp_path: Path) -> None:
    path = files.write(tmp_path / name, files.texts(600))
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(DataError, match=f"{name} cannot be read: .*{said}") as caught:
        drawn(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.zst", "x.parquet", "x.arrow"])
@pytest.mark.parametrize("contents", [b"", b"junk" * 50])
def test_other_contents_are_one_line(contents: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=r"cannot be read|holds no rows") as caught:
        drawn(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_offsets_outside_of_a_damaged_arrow_file_are_not_followed(tmp_path: Path) -> None:
    path = files.write(tmp_path / "x.arrow", files.texts(7))
    contents = path.read_bytes()
    offset = contents.index((2).to_bytes(4, "little") + (4).to_bytes(4, "little"))
    path.write_bytes(contents[:offset] + b"\xff\xff\xff\x7f" + contents[offset + 4 :])
    with pytest.raises(DataError, match=r"x\.arrow cannot be read: In column 0"):
        drawn(path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"a\n\xff\n"))
    with pytest.raises(DataError, match=r"x\.txt\.gz is not UTF-8 text: invalid start byte"):
        drawn(tmp_path / "x.txt.gz")


def test_several_frames_are_one_file(tmp_path: Path) -> None:
    rows = files.texts(20)
    for ending in (".gz", ".zst"):
        path = tmp_path / f"x.txt{ending}"
        parts = [files.lines(path.name, part) for part in (rows[:7], rows[7:])]
        path.write_bytes(b"".join(files.compressed(ending, part) for part in parts))
        assert len(drawn(path, size=99).texts) == 20


def test_pyarrow_is_needed_only_for_its_formats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("x.parquet", "x.arrow", "x.txt.zst", "x.txt.gz"):
        files.write(tmp_path / name, files.texts(3))
    for module in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc", "fsspec"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(drawn(tmp_path / "x.txt.gz").texts) == 3
    for name in ("x.parquet", "x.arrow", "x.txt.zst"):
        with pytest.raises(DataError, match=r"needs pyarrow: pip install -e '\.\[data\]'"):
            drawn(tmp_path / name)


def test_a_stream_is_read_once_until_it_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = files.write(tmp_path / "x.txt.gz", files.texts(3))
    first = sampled_texts(opened(path), 9, 0, ())
    monkeypatch.setattr(Stream, "sample", None)  # reading again would fail
    assert sampled_texts(opened(path), 9, 0, ()) is first
    monkeypatch.undo()
    files.write(path, files.texts(5))
    assert len(sampled_texts(opened(path), 9, 0, ()).texts) == 5


class Watched:
    """Progress that keeps what is reported to it, and may be interrupted."""

    def __init__(self, interrupts: bool = False) -> None:
        self.steps: list[tuple[str, int | None]] = []
        self.done, self._interrupts = 0, interrupts

    def step(self, name: str, total: int | None = None) -> None:
        self.steps.append((name, total))

    def advance(self) -> None:
        self.done += 1
        if self._interrupts:
            signal.raise_signal(signal.SIGINT)


def long_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 40 of what counts as megabytes here."""
    monkeypatch.setattr("qcompile.data.streams.stream._MEGABYTE", 256)
    path = tmp_path / "x.jsonl"
    files.write(path, files.texts(1000))
    path.write_bytes(path.read_bytes()[: 40 * 256 - 1].rpartition(b"\n")[0])
    return tmp_path / "*.jsonl"


def test_long_streams_show_how_far_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Watched()
    sampled_texts(opened(long_stream(tmp_path, monkeypatch), shown), 3, 0, ())
    assert shown.steps == [("read data, MB", 39)] and shown.done == 39
    monkeypatch.undo()
    short = Watched()
    sampled_texts(opened(files.write(tmp_path / "a.txt.gz", files.texts(3)), short), 3, 0, ())
    assert short.steps == [] and short.done == 0


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = opened(long_stream(tmp_path, monkeypatch), Watched(interrupts=True))
    with pytest.raises(KeyboardInterrupt):
        sampled_texts(stream, 3, 0, ())
