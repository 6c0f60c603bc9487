"""Feeds from the columns of a stream that are named as the model's inputs."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.data.feeds import Feeds, InputSpec
from qcompile.data.npz import batch_of
from qcompile.data.python_rows import Table, array_feeds
from qcompile.data.streams.stream import Stream, parsed
from qcompile.errors import DataError


def has_inputs(stream: Stream, inputs: Sequence[InputSpec], text_columns: Sequence[str]) -> bool:
    """Whether the columns of its first file are the model's inputs; if not, they are text.

    Raises DataError where they are neither.
    """
    names = stream.columns()
    if not names:
        return False
    table = Table(names, lambda: iter(()), stream.name)
    if not text_columns and table.has(inputs):
        return True
    table.check_text(inputs, text_columns)
    return False


def column_feeds(
    stream: Stream,
    inputs: Sequence[InputSpec],
    samples: int | None,
    batch_size: int | None,
    seed: int,
) -> Feeds:
    """Feeds of these columns: of all rows, read again by each loop, or of a sample.

    Raises DataError for what cannot be read.
    """
    batch_of(inputs, batch_size)
    names = [spec.name for spec in inputs]

    def choose(found: Sequence[str], where: str) -> Sequence[str]:
        if missing := [name for name in names if name not in found]:
            had = ", ".join(found)
            raise DataError(f"{where}: no column for input {missing[0]!r}; found {had}")
        return names

    if samples is None:
        return Feeds(
            lambda: array_feeds(parsed(stream.rows(choose)), inputs, batch_size),
            inputs,
            stream.name,
        )
    sample = stream.sample(samples, seed, choose)
    return Feeds(
        lambda: array_feeds(parsed(iter(sample.rows)), inputs, batch_size),
        inputs,
        stream.name,
        drawn=sample.note,
    )
