"""Batches of labelled text: every row once, in an order that can be continued anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.data.feeds import InputSpec
from qcompile.errors import DataError
from qcompile.training.labelled.labelled_data import WINDOW, Batch, LabelledData
from qcompile.training.labelled.task import IGNORED, Task
from tests.training.small_run import CLASSES, INPUTS, WORDS, letters, tokenizer, write_rows

SCORES, TAGS = Task("regression"), Task("tokens", ("O", "B", "I"))
SETS, EMBEDDING = Task("multi-label", ("x", "y", "z")), Task("embedding")
A, B, C, X = (WORDS.index(word) for word in ("a", "b", "c", "##x"))


def opened(folder: Path, rows: list[dict[str, object]], task: Task, **more: Any) -> LabelledData:
    inputs = more.pop("inputs", INPUTS)
    return LabelledData(
        write_rows(folder / "rows.jsonl", rows), task, tokenizer(folder), inputs, **more
    )  # fmt: skip


def texts_of(batches: list[Batch]) -> list[str]:
    """All texts and labels, as far as ids say."""
    found = []
    for batch in batches:
        assert batch.targets is not None
        for ids, mask, label in zip(
            batch.feed["input_ids"], batch.mask, batch.targets, strict=True
        ):
            found.append(f"{ids[mask].tolist()} {label}")
    return found


def test_every_row_comes_once_and_each_epoch_in_another_order(tmp_path: Path) -> None:
    data = opened(tmp_path, letters(300), CLASSES, batch_size=4)
    assert data.steps == 75 and len(data) == 300
    first, second = (list(data.batches(0, epoch)) for epoch in (0, 1))
    expected = sorted(texts_of(list(data.ordered())))
    assert [len(batch.mask) for batch in first].count(4) == 75
    assert sorted(texts_of(first)) == sorted(texts_of(second)) == expected
    assert texts_of(first) != texts_of(second)
    assert texts_of(first) == texts_of(list(data.batches(0, 0)))
    assert texts_of(first) != texts_of(list(data.batches(1, 0)))


@pytest.mark.parametrize("start", [0, 1, WINDOW - 1, WINDOW, WINDOW + 3, 74, 75])
def test_an_epoch_continues_at_any_batch(tmp_path: Path, start: int) -> None:
    data = opened(tmp_path, letters(299), CLASSES, batch_size=4)
    whole = texts_of(list(data.batches(3, 2)))
    assert texts_of(list(data.batches(3, 2, start))) == whole[sum(_sizes(data)[:start]) :]


def _sizes(data: LabelledData) -> list[int]:
    return [batch.count for batch in data.batches(3, 2)]


def test_batches_have_texts_of_like_length(tmp_path: Path) -> None:
    data = opened(tmp_path, letters(64), CLASSES, batch_size=4)
    padding = [1 - batch.mask.mean() for batch in data.batches(0, 0)]
    assert np.mean(padding) < 0.05  # in random batches of these lengths it is 0.25


def test_targets_of_all_tasks(tmp_path: Path) -> None:
    [batch] = opened(tmp_path, [{"text": "a", "score": 2.5}], SCORES).ordered()
    assert batch.targets is not None and batch.targets.dtype == np.float32
    assert batch.targets.tolist() == [2.5]
    [batch] = opened(tmp_path, [{"text": "a", "label": ["z", "x"]}], SETS).ordered()
    assert batch.targets is not None and batch.targets.tolist() == [[1, 0, 1]]
    [batch] = opened(tmp_path, [{"text": "a", "label": "right"}], CLASSES).ordered()
    assert batch.targets is not None and batch.targets.tolist() == [1]


def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"tokens": ["ax", "b"], "tags": ["B", "O"]},
        {"text": "c", "tags": "I"},
    ]
    [batch] = opened(tmp_path, rows, TAGS).ordered()
    assert batch.targets is not None and batch.targets.dtype == np.int64
    none = IGNORED
    assert batch.feed["input_ids"].tolist() == [[2, C, 3, 0, 0], [2, A, X, B, 3]]
    assert batch.targets.tolist() == [[none, 2, none, none, none], [none, 1, none, 0, none]]
    assert batch.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_padding_on_the_left_keeps_tags_with_their_tokens(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    made.padding = replace(made.padding, left=True)
    rows: list[dict[str, object]] = [
        {"tokens": ["a"], "tags": ["B"]},
        {"tokens": ["a", "b"], "tags": ["O", "I"]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    [batch] = LabelledData(path, TAGS, made, INPUTS).ordered()
    assert batch.targets is not None
    assert batch.targets[0].tolist() == [IGNORED, IGNORED, 1, IGNORED]
    assert batch.mask[0].tolist() == [False, True, True, True]


def test_words_behind_the_longest_length_have_no_target(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"tokens": ["a", "b", "c"], "tags": ["B", "O", "I"]}]
    [batch] = opened(tmp_path, rows, TAGS, longest=4).ordered()
    assert batch.targets is not None and batch.targets.tolist() == [[IGNORED, 1, 0, IGNORED]]


def test_texts_of_a_pair_are_embedded_alone(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text_a": "a", "text_b": "b", "score": 3}, {"text": "c"}]
    [batch] = opened(tmp_path, rows, EMBEDDING).ordered()
    assert batch.targets is None
    assert batch.feed["input_ids"].tolist() == [[2, A, 3], [2, B, 3], [2, C, 3]]
    [batch] = opened(tmp_path, rows[:1], CLASSES, labelled=False).ordered()
    assert batch.targets is None and batch.feed["input_ids"].tolist() == [[2, A, 3, B, 3]]


def test_a_fixed_batch_is_filled_with_its_own_rows(tmp_path: Path) -> None:
    fixed = tuple(InputSpec(spec.name, spec.dtype, (4, 6)) for spec in INPUTS)
    data = opened(tmp_path, letters(6), CLASSES, inputs=fixed)
    batches = list(data.ordered())
    assert [batch.count for batch in batches] == [4, 2] and data.batch_size == 4
    assert all(batch.feed["input_ids"].shape == (4, 6) for batch in batches)
    assert list(batches[0].parts(1)) == batches[:1]
    last = batches[1]
    assert last.targets is not None and len(last.targets) == 4
    assert (last.feed["input_ids"][2:] == last.feed["input_ids"][:2]).all()


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (CLASSES, {"text": "a", "score": 1}, "line 2: field 'label' is missing .'score' is given"),
        (CLASSES, {"text": " ", "label": 1}, "line 2: empty text"),
        (CLASSES, {"text_a": "a", "text_b": "", "label": 1}, "line 2: empty text"),
        (CLASSES, {"text_a": "a", "label": 1}, "line 2: no field 'text', or 'text_a' and 'text_b'"),
        (CLASSES, {"text": 3, "label": 1}, "line 2: field 'text' is int"),
        (CLASSES, {"text": "a", "label": "up"}, "line 2: unknown label 'up', expected one of left"),
    ],
)
def test_rows_of_another_task(
    tmp_path: Path, task: Task, row: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, [{"text": "a", "label": 0}, row], task)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": [], "tags": []}, "field 'tokens' has no words"),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "field 'tokens' has an entry that is no word"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "field 'tokens' has an entry that is no word"),
        ({"tokens": {"a": 1}, "tags": ["O"]}, "field 'tokens' has no words"),
        ({"tokens": ["a"], "tags": ["O", "B"]}, "2 tags for 1 tokens"),
        ({"text_a": "a", "text_b": "b", "tags": "O"}, "a pair of texts"),
        ({"tags": ["O"]}, "no field 'text'"),
        ({"tokens": ["a"], "label": 1}, "field 'tags' is missing .'label' is given"),
    ],
)
def test_tags_that_do_not_fit(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: {message}"):
        opened(tmp_path, [row], TAGS)


def test_a_changed_file_is_one_line(tmp_path: Path) -> None:
    data = opened(tmp_path, [{"text": "a", "label": 0}], CLASSES)
    write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "up"}])
    with pytest.raises(DataError, match="has changed since it was first read: unknown label"):
        list(data.ordered())


def test_the_digest_depends_on_how_the_file_is_read(tmp_path: Path) -> None:
    rows = letters(3)
    found = {opened(tmp_path, rows, CLASSES, **more).digest for more in (
        {}, {"longest": 4}, {"batch_size": 2}, {"labelled": False},
    )}  # fmt: skip
    assert len(found) == 4
    assert opened(tmp_path, rows, CLASSES).digest in found


@pytest.mark.parametrize(("tokens", "sizes"), [(1, [1] * 5), (8, [2, 2, 1]), (99, [5])])
def test_a_batch_in_parts(tmp_path: Path, tokens: int, sizes: list[int]) -> None:
    rows: list[dict[str, object]] = [{"text": "a b", "label": i % 2} for i in range(5)]
    (batch,) = opened(tmp_path, rows, CLASSES, batch_size=5).ordered()
    assert batch.mask.shape == (5, 4)
    parts = list(batch.parts(tokens))
    assert [part.count for part in parts] == sizes == [len(part.mask) for part in parts]
    for name, values in batch.feed.items():
        assert np.array_equal(np.concatenate([part.feed[name] for part in parts]), values)
    assert batch.targets is not None
    targets = [part.targets for part in parts if part.targets is not None]
    assert np.array_equal(np.concatenate(targets), batch.targets)
