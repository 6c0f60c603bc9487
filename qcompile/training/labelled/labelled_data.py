"""Batches of labelled text from files larger than memory, in a random order or in their own.

Rows are read in windows of 16 batches, tokenized, and sorted by length within the window, so that a
batch has sentences of similar length; the batches of a window are then shuffled. Only one window is
in memory. The order is a function of seed and epoch, so training continues anywhere in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qcompile.data.feeds import Feed, InputSpec
from qcompile.data.npz import batch_of
from qcompile.data.text import check_columns, check_inputs, feed_of, fixed_width, sentence_of
from qcompile.data.tokenizer import TextTokenizer, Tokens
from qcompile.quant import Array
from qcompile.training.labelled.labelled_rows import LabelledRows, Row
from qcompile.training.labelled.shuffle import Shuffle
from qcompile.training.labelled.task import IGNORED, Target, Task

DEFAULT_BATCH = 32
WINDOW = 16  # batches whose rows are sorted together
Sample: TypeAlias = tuple[Tokens, Target | None]


@dataclass(frozen=True)
class Batch:
    """Padded rows and their targets.

    Attributes:
        feed: the model's inputs, [rows, width] each.
        mask: bool [rows, width], False for padding.
        targets: int64 [rows] of classes, float32 [rows] of scores, float32 [rows, labels] of sets
            of labels, int64 [rows, width] of tags with -100 where there is none; None without
            labels.
        count: the first rows that are the batch's own; others repeat them, where the model fixes
            the batch size.
        is_fixed: whether it does.
    """

    feed: Feed
    mask: Array
    targets: Array | None
    count: int
    is_fixed: bool = False

    def parts(self, tokens: int, least: int = 1) -> Iterator[Batch]:
        """The batch in parts of at most so many tokens, padding included, or single rows.

        least: in at least so many parts, if there are as many rows. A batch whose size the model
        fixes stays whole.
        """
        rows, width = self.mask.shape
        size = max(1, min(tokens // max(1, width), -(-rows // least)))
        if rows <= size or self.is_fixed:
            yield self
            return
        size = -(-rows // -(-rows // size))  # equal parts
        for start in range(0, rows, size):
            own = slice(start, start + size)
            feed = {name: values[own] for name, values in self.feed.items()}
            targets = None if self.targets is None else self.targets[own]
            mask = self.mask[own]
            yield Batch(feed, mask, targets, len(mask))


class LabelledData:
    """The samples of a .jsonl, .csv or .txt file as batches for one model.

    labelled: whether targets are read; an embedding has none. For an embedding, each text of a pair
    is a sample of its own. Texts of tokens and tags are split into words: the list ``tokens``, or
    ``text`` at white space. A word's first token has its tag. columns: names of the fields that
    hold the text or the pair, or the list of words; empty for those. most: of how many samples, the
    first of the file, the data consists; None for all.

    Raises DataError, with the line, for the first row that does not fit the task.
    """

    def __init__(
        self,
        path: Path,
        task: Task,
        tokenizer: TextTokenizer,
        inputs: Sequence[InputSpec],
        *,
        labelled: bool = True,
        batch_size: int | None = None,
        longest: int = 128,
        columns: Sequence[str] = (),
        most: int | None = None,
    ) -> None:
        check_inputs(inputs)
        check_columns(columns, path)
        self._columns = tuple(columns)
        self.task, self._tokenizer, self._inputs = task, tokenizer, inputs
        self.labelled = labelled and task.kind != "embedding"
        self.batch_size, self._is_fixed = batch_of(inputs, batch_size)
        if batch_size is None and not self._is_fixed:
            self.batch_size = DEFAULT_BATCH
        self._width = fixed_width(inputs)
        self._longest = min(longest, self._width or longest, tokenizer.longest or longest)
        self._rows = LabelledRows(path, self._check)
        self._count = len(self._rows) if most is None else min(most, len(self._rows))

    @property
    def digest(self) -> str:
        """Of the file and of how it is read."""
        read = f"{self._longest} {self.batch_size} {self.labelled} {self.task}"
        if len(self) < len(self._rows):
            read = f"{read} {len(self)} rows"
        columns = f" {self._columns}" if self._columns else ""
        return f"{self._rows.digest} {read}{columns}"

    @property
    def steps(self) -> int:
        """Batches of one epoch."""
        return -(-len(self) // self.batch_size)

    def __len__(self) -> int:
        return self._count

    def batches(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch in their random order, from number ``start`` on."""
        shuffle = Shuffle(len(self), seed, epoch)
        for window in range(start // WINDOW, -(-self.steps // WINDOW)):
            numbers = shuffle(self._positions(window))
            made = self._window(numbers.tolist())
            order = np.random.default_rng([seed, epoch, window]).permutation(len(made))
            for i in order[max(0, start - window * WINDOW) :]:
                yield self._batch(made[i])

    def ordered(self) -> Iterator[Batch]:
        """All batches in the order of the file, up to the sorting within a window."""
        for window in range(-(-self.steps // WINDOW)):
            for samples in self._window(self._positions(window).tolist()):
                yield self._batch(samples)

    def _positions(self, window: int) -> Array:
        size = WINDOW * self.batch_size
        return np.arange(window * size, min(len(self), (window + 1) * size))

    def _window(self, numbers: Sequence[int]) -> list[list[Sample]]:
        """These samples in batches, shortest first. Raises DataError where the file has changed."""
        rows = self._rows.read(numbers)
        try:
            samples = self._encoded(rows)
        except ValueError as e:
            raise self._rows.changed(e) from e
        samples.sort(key=lambda sample: len(sample[0].ids))
        size = self.batch_size
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def _check(self, row: Row, where: str) -> int:
        """The number of samples in a row. Raises DataError or ValueError where it cannot be used.

        Texts are checked here too, so that training does not fail after hours.
        """
        if self._has_words:
            words = _words(row, where, self._columns)
            self.task.target(row, len(words))
            return 1
        texts = sentence_of(row, where, self._columns)
        if not all(text.strip() for text in texts):
            raise ValueError("empty text")
        if self.labelled:
            self.task.target(row)
        return len(texts) if self.task.kind == "embedding" else 1

    @property
    def _has_words(self) -> bool:
        return self.labelled and self.task.kind == "tokens"

    def _encoded(self, rows: Sequence[tuple[Row, int]]) -> list[Sample]:
        if self._has_words:
            return self._encoded_words([row for row, _ in rows])
        where = str(self._rows.path)
        texts = [sentence_of(row, where, self._columns) for row, _ in rows]
        if self.task.kind == "embedding":
            texts = [(text[part],) for text, (_, part) in zip(texts, rows, strict=True)]
        tokens = self._tokenizer.encode(texts, self._longest)
        targets = [self.task.target(row) if self.labelled else None for row, _ in rows]
        return list(zip(tokens, targets, strict=True))

    def _encoded_words(self, rows: Sequence[Row]) -> list[Sample]:
        texts = [_words(row, str(self._rows.path), self._columns) for row in rows]
        samples: list[Sample] = []
        encoded = self._tokenizer.encode_words(texts, self._longest)
        for row, words, (tokens, numbers) in zip(rows, texts, encoded, strict=True):
            tags = self.task.target(row, len(words))
            assert isinstance(tags, tuple)
            before = [None, *numbers[:-1]]
            starts = (None if n == b else n for n, b in zip(numbers, before, strict=True))
            samples.append((tokens, tuple(IGNORED if n is None else tags[n] for n in starts)))
        return samples

    def _batch(self, samples: list[Sample]) -> Batch:
        count = len(samples)
        if self._is_fixed:
            samples = [samples[i % count] for i in range(self.batch_size)]
        rows = [tokens for tokens, _ in samples]
        padding = self._tokenizer.padding
        width = self._width or max(1, *(len(row.ids) for row in rows))
        mask = np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            mask[i, : len(row.ids)] = True
        if padding.left:
            mask = mask[:, ::-1].copy()
        feed = feed_of(rows, self._inputs, padding, width)
        targets = self._targets([t for _, t in samples], mask)
        return Batch(feed, mask, targets, count, self._is_fixed)

    def _targets(self, targets: Sequence[Any], mask: Array) -> Array | None:
        if not self.labelled:
            return None
        if self.task.kind == "classification":
            return np.array(targets, np.int64)
        if self.task.kind == "regression":
            return np.array(targets, np.float32)
        if self.task.kind == "multi-label":
            sets = np.zeros((len(targets), len(self.task.labels)), np.float32)
            for i, labels in enumerate(targets):
                sets[i, list(labels)] = 1
            return sets
        tags = np.full(mask.shape, IGNORED, np.int64)
        for i, row in enumerate(targets):
            tags[i, mask[i]] = row
        return tags


def _words(row: Row, where: str, columns: Sequence[str] = ()) -> list[str]:
    """The words of a row of tokens and tags. Raises DataError or ValueError."""
    words = row.get(columns[0] if columns else "tokens")
    if words is None or len(columns) > 1:
        [words, *others] = sentence_of(row, where, columns)
        if others:
            raise ValueError("a pair of texts, expected 'tokens' or 'text'")
    if isinstance(words, str):
        words = words.split()
    if not isinstance(words, list) or not words:
        raise ValueError("field 'tokens' has no words, expected a list of them")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError("field 'tokens' has an entry that is no word, expected text")
    return words
