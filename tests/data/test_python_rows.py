"""Texts, pairs and tables from Python: read as files of the same rows, and refused with the row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qcompile.data.feeds import Feeds, InputSpec
from qcompile.data.open_data import check_text, open_data
from qcompile.errors import DataError

I64, F32, U8 = (np.dtype(kind) for kind in (np.int64, np.float32, np.uint8))
TEXT = tuple(InputSpec(n, I64, ("b", "s")) for n in ("input_ids", "attention_mask"))
X, Y = InputSpec("x", F32, ("b", 1)), InputSpec("y", I64, ("b", "s"))
TEXTS = ["the cat sat", "the dog", "a cat"]
PAIRS = [("the cat", "sat"), ("the dog", "ran far"), ("a cat", "sat on")]


class Frame:
    """What pandas and polars share: names of columns, over which it iterates, and columns by name.

    Iterating over a frame gives names, which must not be taken for texts.
    """

    def __init__(self, **columns: Sequence[object]) -> None:
        self._columns = columns
        self.columns = list(columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, name: str) -> Sequence[object]:
        return self._columns[name]


class Dataset:
    """What a Dataset of datasets has."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows, self.column_names = rows, list(rows[0]) if rows else []

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer by words, with two special tokens around a text and three around a pair."""
    text = "[PAD] [UNK] [CLS] [SEP] the cat dog sat on a ran far"
    words = text.split()
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    root = tmp_path_factory.mktemp("tokenizer")
    made.save(str(root / "tokenizer.json"))
    return root


def opened(data: Any, folder: Path | None, *columns: str, inputs: Any = TEXT, **more: Any) -> Feeds:
    return open_data(data, inputs, tokenizer=folder, text_columns=columns, **more)


def ids(feeds: Feeds) -> list[list[list[int]]]:
    return [feed["input_ids"].tolist() for feed in feeds]


def from_file(folder: Path, tmp_path: Path, lines: list[str], name: str = "t.txt") -> Any:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return ids(open_data(path, TEXT, tokenizer=folder))


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        (TEXTS, ()),
        (tuple(TEXTS), ()),
        (np.array(TEXTS), ()),
        ([(text,) for text in TEXTS], ()),
        ([{"text": text, "label": 1} for text in TEXTS], ()),
        ([{"q": text, "label": 1} for text in TEXTS], ("q",)),
        (Frame(text=TEXTS, label=[0, 1, 0]), ()),
        (Frame(q=TEXTS, text=[1, 2, 3]), ("q",)),
        (Dataset([{"q": text, "label": 1} for text in TEXTS]), ("q",)),
    ],
)
def test_texts_are_read_as_from_a_file(
    data: Any, columns: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    feeds = opened(data, folder, *columns)
    assert ids(feeds) == ids(feeds) == from_file(folder, tmp_path, TEXTS)
    assert feeds.is_text and feeds.reusable


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        (PAIRS, ()),
        ([list(pair) for pair in PAIRS], ()),
        (np.array(PAIRS), ()),
        (Frame(a=[a for a, _ in PAIRS], b=[b for _, b in PAIRS]), ("a", "b")),
        (Dataset([{"text_a": a, "text_b": b} for a, b in PAIRS]), ()),
    ],
)
def test_pairs_are_read_as_from_a_file(
    data: Any, columns: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    lines = ["text_a,text_b", *map(",".join, PAIRS)]
    assert ids(opened(data, folder, *columns)) == from_file(folder, tmp_path, lines, "t.csv")


def test_a_generator_of_texts_is_read_once_and_no_further_than_asked(folder: Path) -> None:
    read: list[int] = []

    def texts() -> Iterator[str]:
        for i in range(100):
            read.append(i)
            yield "the cat"

    feeds = opened(texts(), folder, samples=3)
    assert sum(len(batch) for batch in ids(feeds)) == 3 and len(read) == 3


def test_a_generator_of_feeds_loses_none() -> None:
    feeds = opened(({"x": np.full((1, 1), i, np.float32)} for i in range(3)), None, inputs=[X])
    assert [f["x"].item() for f in feeds] == [0, 1, 2] and not feeds.is_text


def test_a_feed_of_strings_is_a_feed() -> None:
    spec = InputSpec("text", np.dtype(object), ("b",))
    (feed,) = opened([{"text": np.array(["a", "b"])}], None, inputs=[spec])
    assert feed["text"].shape == (2,)
    (feed,) = opened([{"x": "a"}], None, inputs=[InputSpec("x", np.dtype(object), ())])
    assert feed["x"].item() == "a"


def test_columns_of_arrays_are_stacked() -> None:
    frame = Frame(x=[0.5, 1.5, 2.5], y=[[1, 2], [3, 4], [5, 6]], other=["a", "b", "c"])
    found = list(opened(frame, None, inputs=[X, Y], batch_size=2))
    assert [f["x"].tolist() for f in found] == [[[0.5], [1.5]], [[2.5]]]
    assert [f["y"].tolist() for f in found] == [[[1, 2], [3, 4]], [[5, 6]]]
    assert found[0]["x"].dtype == F32 and found[0]["y"].dtype == I64


def test_a_fixed_batch_is_filled_by_repeating_rows() -> None:
    fixed = InputSpec("y", I64, (2, "s"))
    found = list(opened(Dataset([{"y": [i]} for i in range(3)]), None, inputs=[fixed]))
    assert [f["y"].tolist() for f in found] == [[[0], [1]], [[2], [2]]]


@pytest.mark.parametrize(
    ("data", "columns", "said"),
    [
        (["the cat", 7], (), r"^data, row 1: found int, expected a text or a pair of texts$"),
        (["a", None], (), "row 1: found NoneType, expected a text"),
        ([("a", "b"), ("a", "b", "c")], (), "row 1: found tuple of 3, expected a text or a pair"),
        ([("a", "b"), ("a", 1)], (), "row 1: found tuple of 2, expected"),
        ([("a", "b", "c")], (), "row 0: found tuple of 3, expected"),
        (["a"], ("q",), "row 0: found str, which has no column 'q'"),
        ([{"text": "a"}, {"text": 5}], (), "row 1: field 'text' is int, expected a string"),
        ([{"q": "a"}, {"q": None}], ("q",), "row 1: field 'q' is empty, expected a string"),
        ([{"q": "a"}], (), r"row 0: no field 'text', or .* \(--text-columns names others\)"),
        ([{"a": "a"}], ("a", "b"), "row 0: no field 'b'; found a"),
        (Frame(q=["a", float("nan")]), ("q",), "row 1: field 'q' is float, expected a string"),
        (Frame(q=["a"]), ("p",), "^data has no column 'p', expected one of q$"),
        (Frame(q=["a"]), (), r"has the columns q, expected a column for each input .* or text"),
        (Frame(text=[]), (), "holds no rows"),
        (Dataset(["a"]), ("q",), "no column 'q'"),
        ({"train": Frame(a=[1]), "test": Frame(a=[2])}, (), "dict of tables, .* train, test"),
        (TEXTS, ("a", "b", "c"), "text columns a, b, c: expected one name, or two"),
        (TEXTS, ("a", "a"), "text columns a, a: expected"),
        ({"x": 1}, ("q",), "data yields feeds, which has no text column 'q'"),
        ([{"x": 1}], ("q",), "row 0: no field 'q'; found x"),
        (b"text", (), "data is bytes, expected an iterable of feeds"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_row(
    data: Any, columns: tuple[str, ...], said: str, folder: Path
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        list(opened(data, folder, *columns))
    assert "\n" not in str(caught.value)


def test_rows_of_a_dataset_that_are_no_dicts(folder: Path) -> None:
    data = Dataset([{"text": "a"}])
    data._rows.append("b")
    with pytest.raises(DataError, match="data yields str, expected rows as dicts"):
        opened(data, folder)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match=r"^data is text and needs a tokenizer"):
        opened(TEXTS, None)


@pytest.mark.parametrize(
    ("spec", "cells", "said"),
    [
        (X, [1.0, "a"], "row 1, column 'x': found <U1, expected float32"),
        (X, [1.0, None], "row 1, column 'x': found NoneType, expected float32"),
        (Y, [[1], [1.5]], "row 1, column 'y': found float64, expected int64"),
        (Y, [[1], [1, 2]], r"row 1, .*shape \[2\], but \[1\] before .* \(batch size 1\)"),
        (Y, [[[1], [1, 2]]], "row 0, column 'y': list is no array"),
        (
            InputSpec("u", U8, ("b",)),
            [np.uint16(1), np.uint16(300)],
            "row 1, .* integers that uint8 cannot hold",
        ),
    ],
)
def test_cells_that_are_no_values_of_the_input(
    spec: InputSpec, cells: list[object], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        list(opened(Frame(**{spec.name: cells}), None, inputs=[spec]))


def test_a_source_that_fails_at_once_is_one_line() -> None:
    def broken() -> Iterator[str]:
        raise OSError("gone\naway")
        yield ""

    with pytest.raises(DataError, match=r"data failed after 0 feeds: OSError: gone$"):
        opened(broken(), None)


# ---- columns of files, and what is checked before a model is there


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.csv", "id, q ,a\n1,the cat,sat\n"), ("t.jsonl", '{"q": "the cat", "a": "sat"}\n')],
)
def test_columns_of_files(name: str, text: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert ids(opened(path, folder, "q", "a")) == ids(opened([("the cat", "sat")], folder))
    with pytest.raises(DataError, match=f"{name}, line [12]: no field 'p'; found"):
        opened(path, folder, "p")


def test_files_without_columns(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat\n")
    np.savez(tmp_path / "x.npz", x=np.ones((1, 1), np.float32))
    with pytest.raises(DataError, match=r"t.txt has no columns, which --text-columns names"):
        opened(tmp_path / "t.txt", folder, "q")
    with pytest.raises(DataError, match=r"x.npz' is no text, which has no text column 'q'"):
        opened(tmp_path / "x.npz", folder, "q", inputs=[X])


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("a\n1\n", {"text_columns": ("q",)}, "line 2: no field 'q'; found a"),
        ("text\nthe cat sat\n", {"max_length": 1}, "length 1 leaves no room"),
        ("text\nthe cat sat\n", {"max_length": 9, "positions": 2}, "model takes 2 tokens at most"),
    ],
)
def test_text_is_checked_before_an_export(
    text: str, more: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        check_text(path, tokenizer=folder, **more)


def test_other_data_is_checked_as_far_as_it_can_be(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=1)
    check_text(tmp_path / "x.npz", tokenizer=None)
    check_text("package.module:function", tokenizer=None)
    with pytest.raises(DataError, match="does not exist"):
        check_text(tmp_path / "t.txt", tokenizer=None)
    with pytest.raises(DataError, match="is no text, which has no text column 'q'"):
        check_text(tmp_path / "x.npz", tokenizer=None, text_columns=("q",))
