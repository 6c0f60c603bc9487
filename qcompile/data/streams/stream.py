"""The rows of all files of a stream, and samples of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qcompile.data.streams.blocks import Block, Choose
from qcompile.data.streams.columnar_files import column_names, columnar_blocks
from qcompile.data.streams.line_files import line_blocks
from qcompile.data.streams.row_draw import draw_rows
from qcompile.data.streams.stream_files import StreamFile, files_of
from qcompile.data.text import PlacedRow, sentence_of, text_fields
from qcompile.data.tokenizer import Sentence
from qcompile.errors import DataError
from qcompile.quant import Array

_MEGABYTE = 1 << 20
_SHORT = 8  # megabytes that are read in a moment
_PIECE = 1 << 18  # row numbers that are drawn from at a time


class Reading(Protocol):
    """What is shown while a long stream is read."""

    def step(self, name: str, total: int | None = None) -> None:
        """Reading begins; ``total`` megabytes, None where unknown."""

    def advance(self) -> None:
        """A megabyte was read."""


@dataclass(frozen=True)
class Sample:
    """What was drawn, in the order of the stream.

    ``note`` says of how many rows; it is None where all were taken.
    """

    rows: tuple[PlacedRow, ...]
    note: str | None


@dataclass(frozen=True)
class Stream:
    """Rows of files, in their order. name: as the user gave it. progress: shows how far the drawing
    of a sample is.

    Two streams are equal if files of the same contents are.
    """

    name: str
    files: tuple[StreamFile, ...]
    progress: Reading | None = field(default=None, compare=False)

    def columns(self) -> tuple[str, ...]:
        """The columns of the first file; none where they have no types, as in .jsonl and .csv.

        Raises DataError.
        """
        return column_names(self.files[0]) if self.files[0].is_columnar else ()

    def rows(self, choose: Choose) -> Iterator[PlacedRow]:
        """All rows. Raises DataError for what cannot be read, and what ``choose`` raises."""
        for block in self._blocks(choose, None):
            yield from block.rows(range(block.count))

    def sample(self, size: int, seed: int, choose: Choose) -> Sample:
        """Rows drawn from the whole stream: all of them, if there are no more.

        Raises DataError as ``rows`` does, and for a stream without rows.
        """
        kept: dict[int, PlacedRow] = {}
        drawn: Array = np.zeros(0, np.int64)
        first = 0
        for block in self._blocks(choose, self.progress):
            drawn = _drawn(drawn, first, block.count, size, seed)
            old, new = np.split(drawn, [np.searchsorted(drawn, first)])
            if len(new):
                rows = block.rows((new - first).tolist())
                kept = {row: kept[row] for row in old.tolist()}
                kept.update(zip(new.tolist(), rows, strict=True))
            first += block.count
        if not first:
            raise DataError(f"{self.name} holds no rows, expected at least one")
        note = f"{len(kept)} of {first} rows were drawn, with seed {seed}"
        return Sample(tuple(kept.values()), note if len(kept) < first else None)

    def _blocks(self, choose: Choose, progress: Reading | None) -> Iterator[Block]:
        shown = _Shown(self.files, progress)
        for file in self.files:
            for block in (columnar_blocks if file.is_columnar else line_blocks)(file, choose):
                yield block
                shown.update(block.done)
            shown.end_of(file)


def open_stream(data: str | Path, progress: Reading | None = None) -> Stream | None:
    """The stream that a path, a pattern or an address names; None where it names other data.

    Raises DataError where a stream is not there, or has files of unknown formats.
    """
    files = files_of(data)
    return Stream(str(data), tuple(files), progress) if files else None


def _drawn(held: Array, first: int, count: int, size: int, seed: int) -> Array:
    """The sample of the rows that were in the sample before, and of these ``count`` new ones."""
    for start in range(first, first + count, _PIECE):
        new = np.arange(start, min(start + _PIECE, first + count))
        held = draw_rows(np.concatenate([held, new]), size, seed)
    return held


@dataclass(frozen=True)
class Texts:
    """Texts drawn from a stream, and the note of the sample."""

    texts: tuple[Sentence, ...]
    note: str | None


# A compilation of a folder reads its data before the export, and once more for each model.
@lru_cache(maxsize=1)
def sampled_texts(stream: Stream, size: int, seed: int, columns: tuple[str, ...]) -> Texts:
    """Texts drawn from the whole stream. ``columns``: as for ``sentence_of``.

    Raises DataError, with file and row, for a row that is drawn, or the first of a file, and is not
    text.
    """

    def choose(names: Sequence[str], where: str) -> Sequence[str]:
        return text_fields(names, where, columns)

    found = stream.sample(size, seed, choose)
    texts = tuple(sentence_of(row.read(), row.where, columns) for row in found.rows)
    return Texts(texts, found.note)


def parsed(rows: Iterator[PlacedRow]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and fields of each row."""
    return ((row.where, row.read()) for row in rows)


class _Shown:
    """Shows megabytes of a stream that is long, or whose length is not known."""

    def __init__(self, files: Sequence[StreamFile], progress: Reading | None) -> None:
        sizes = [file.stored.size for file in files]
        known = None if None in sizes else sum(size or 0 for size in sizes) // _MEGABYTE
        self._progress = progress if known is None or known >= _SHORT else None
        self._before = self._shown = 0
        if self._progress is not None:
            self._progress.step("read data, MB", known)

    def update(self, done: int) -> None:
        """``done`` bytes of the current file have been read."""
        if self._progress is None:
            return
        reached = (self._before + done) // _MEGABYTE
        for _ in range(reached - self._shown):
            self._progress.advance()
        self._shown = max(self._shown, reached)

    def end_of(self, file: StreamFile) -> None:
        """A file has been read."""
        self._before += file.stored.size or 0
        self.update(0)
