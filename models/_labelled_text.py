"""Labelled text for the scripts that train and score classifiers: rows, batches, metrics.

A split is JSON lines with text, or text_a and text_b, and a label, or a score for regression. No
torch and no qcompile here, so that training and evaluation read the same rows and batches.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from models._common import fail

Floats: TypeAlias = npt.NDArray[Any]
Text: TypeAlias = str | tuple[str, str]
Feed: TypeAlias = dict[str, npt.NDArray[np.int64]]
BATCH = 32


@dataclass(frozen=True)
class Task:
    """A task: the split that it is measured on, and its metric, accuracy or spearman.

    ``labels`` are in the order of the logits; empty for a regression.
    """

    name: str
    split: str
    metric: str
    max_length: int
    labels: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One example: a text or a pair of texts, and its label or score."""

    text: Text
    target: str | int | float


@dataclass(frozen=True)
class Examples:
    """A tokenized split: batches of row numbers with their feeds, and one target per row."""

    task: Task
    feeds: list[tuple[list[int], Feed]]
    targets: Floats


def read_rows(path: Path) -> list[Row]:
    """All rows of a split."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        fail(f"{path} holds no rows")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        fail(f"{where}: not JSON: {error}")
    try:
        text = values["text"] if "text" in values else (values["text_a"], values["text_b"])
        target = values["label"] if "label" in values else float(values["score"])
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{where}: expected text, or text_a and text_b, and label or score; {error!r}")
    return Row(text, target)


def labels_of(rows: Sequence[Row]) -> tuple[str | int, ...]:
    """The labels of training rows, sorted; none where they are scores."""
    distinct = {row.target for row in rows}
    if any(isinstance(target, float) for target in distinct):
        return ()
    return tuple(sorted(target for target in distinct if not isinstance(target, float)))


def targets(rows: Sequence[Row], labels: Sequence[str | int]) -> Floats:
    """Indices into ``labels``, or the scores where there are none."""
    if not labels:
        return np.array([float(row.target) for row in rows], np.float32)
    index = {label: i for i, label in enumerate(labels)}
    for row in rows:
        if row.target not in index:
            fail(f"label {row.target!r} is none of the {len(labels)} labels of the training split")
    return np.array([index[row.target] for row in rows], np.int64)  # type: ignore[index]


def encode(texts: Sequence[Text], tokenizer: Path, max_length: int) -> tuple[list[Any], int]:
    """One unpadded encoding per text, and the padding id, by the folder's tokenizer.json."""
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        fail(f"{tokenizer} holds no tokenizer.json")
    try:
        engine = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    except ImportError as error:
        fail(f"cannot import tokenizers ({error}); run: pip install tokenizers")
    except Exception as error:  # the package raises nothing narrower
        fail(f"{file} is not a tokenizer: {error}")
    engine.no_padding()
    engine.enable_truncation(max_length)
    return engine.encode_batch(list(texts)), engine.token_to_id("[PAD]") or 0


def batches(lengths: Sequence[int], size: int = BATCH) -> list[list[int]]:
    """Row numbers in batches, shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def feed_of(encodings: Sequence[Any], pad: int) -> Feed:
    """One batch, padded to its longest row."""
    shape = len(encodings), max(len(e.ids) for e in encodings)
    feed = {
        "input_ids": np.full(shape, pad, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }
    for i, encoding in enumerate(encodings):
        count = len(encoding.ids)
        feed["input_ids"][i, :count] = encoding.ids
        feed["attention_mask"][i, :count] = 1
        feed["token_type_ids"][i, :count] = encoding.type_ids
    return feed


def examples_of(task: Task, rows: Sequence[Row], tokenizer: Path) -> Examples:
    """The rows in batches of similar length."""
    encoded, pad = encode([row.text for row in rows], tokenizer, task.max_length)
    numbers = batches([len(e.ids) for e in encoded])
    feeds = [(batch, feed_of([encoded[i] for i in batch], pad)) for batch in numbers]
    return Examples(task, feeds, targets(rows, task.labels))


def gather(examples: Examples, batch_logits: Sequence[Floats]) -> Floats:
    """The logits of all batches in the order of the rows, float64 [rows, outputs]."""
    logits = np.zeros((len(examples.targets), batch_logits[0].shape[1]))
    for (numbers, _), values in zip(examples.feeds, batch_logits, strict=True):
        logits[numbers] = values
    return logits


def metric(examples: Examples, logits: Floats) -> float:
    """The task's metric of its logits, times 100."""
    if examples.task.metric == "spearman":
        return spearman(logits[:, 0], examples.targets)
    return accuracy(logits, examples.targets)


def accuracy(logits: Floats, expected: Floats) -> float:
    """Share of rows whose largest logit is the label's, times 100."""
    return 100 * float(np.mean(logits.argmax(1) == expected))


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation times 100; ties share their mean rank."""
    return 100 * float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Floats) -> Floats:
    """Ranks from 1 of the values, their mean where values are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: Floats = (ends - (counts - 1) / 2)[inverse]
    return middle


def flips(a: Floats, b: Floats) -> float:
    """Share of rows whose argmax differs, times 100; of single outputs, the mean difference."""
    if a.shape[1] == 1:
        return float(np.mean(np.abs(a - b)))
    return 100 * float(np.mean(a.argmax(1) != b.argmax(1)))
