"""Labelled text in columns of other names: read as that of the usual names, and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcompile.errors import DataError
from qcompile.training.labelled.labelled_data import LabelledData
from qcompile.training.labelled.task import Task
from tests.training.small_run import CLASSES, INPUTS, letters, tokenizer, write_rows

TAGS = Task("tokens", ("O", "B"))


def opened(folder: Path, rows: list[dict[str, Any]], task: Task, *columns: str) -> LabelledData:
    path = write_rows(folder / "rows.jsonl", rows)
    return LabelledData(path, task, tokenizer(folder), INPUTS, columns=columns)


def renamed(rows: list[dict[str, Any]], **names: str) -> list[dict[str, Any]]:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def test_texts_and_words_have_any_name(tmp_path: Path) -> None:
    rows = letters(20)
    one = opened(tmp_path, rows, CLASSES)
    plain = list(one.ordered())
    other = opened(tmp_path, renamed(rows, text="sentence"), CLASSES, "sentence")
    assert [b.feed["input_ids"].tolist() for b in plain] == [
        b.feed["input_ids"].tolist() for b in other.ordered()
    ]
    assert one.digest.partition(" ")[2] != other.digest.partition(" ")[2]
    tagged = [{"words": ["a", "b"], "tags": ["O", "B"]}]
    [batch] = opened(tmp_path, tagged, TAGS, "words").ordered()
    assert batch.targets is not None and {0, 1} <= {*batch.targets.ravel().tolist()}


def test_columns_that_do_not_fit_are_named(tmp_path: Path) -> None:
    rows = letters(3)
    with pytest.raises(DataError, match="line 1: no field 'q'; found"):
        opened(tmp_path, rows, CLASSES, "q")
    with pytest.raises(DataError, match="line 1: a pair of texts, expected 'tokens' or 'text'"):
        opened(tmp_path, [{"a": "a", "b": "b", "tags": ["O"]}], TAGS, "a", "b")
    path = tmp_path / "t.txt"
    path.write_text("a\n")
    with pytest.raises(DataError, match=r"has no columns, which --text-columns names"):
        LabelledData(path, Task("embedding"), tokenizer(tmp_path), INPUTS, columns=("a",))
