"""Consecutive rows of a file, of which only those that are asked for are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qcompile.data.text import PlacedRow

# Called with the fields that rows have, and their place: the fields to read. Raises DataError where
# one is missing.
Choose: TypeAlias = Callable[[Sequence[str], str], Sequence[str]]


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Attributes:
        count: how many.
        rows: reads those at these offsets in the block, which ascend. To be called before the next
            block is asked for.
        done: bytes of the file that were read when the block ends.
    """

    count: int
    rows: Callable[[Sequence[int]], Iterator[PlacedRow]]
    done: int
