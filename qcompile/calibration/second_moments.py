"""Second moments of a tensor's rows over all data, by sums that no split of the data changes.

Rows are scaled to length 1 and rounded to a grid, so that their moments are integers, which float64
adds exactly in any order: neither batches, merging nor threads of the BLAS library change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from qcompile.quant import Array

# Steps of the grid in a length of 1. Moments are integers below 2^36 a row, so float64 adds those
# of 2^17 rows exactly; beyond, it rounds at 2^-53. A step is small compared with sqrt(1/channels),
# the usual size of a value.
_STEPS = 2.0**18
_ROWS = 1024  # rows that are multiplied at a time: with fewer, most time goes into adding matrices
_BLOCK = 256  # channels in a block of the triangle


@dataclass(frozen=True)
class Moments:
    """Of ``count`` rows x: the sum of x xᵀ / |x|², float32 (channels, channels), and the mean of x,
    float32 (channels,). Rows of zeros add nothing to the sum."""

    second: Array
    mean: Array
    count: int


@dataclass
class MomentSum:
    """Sums over rows, added batch by batch.

    Of the symmetric matrix, blocks on and above the diagonal are kept, as one float64 array: little
    more than half of it where there are many channels. keep: stores that array and the rows that
    wait between batches.
    """

    keep: Callable[[Array], Array] | None = None
    _second: Array | None = None
    _lent: bool = False  # a caller holds the array: changes go into a copy
    _rows: Array = field(default_factory=lambda: np.zeros(0))
    _count: int = 0
    _waiting: list[Array] = field(default_factory=list)
    _log: list[tuple[Array, int]] | None = None  # what was added to the mean, step by step

    def prepare_to_merge(self) -> None:
        """Keep each sum of rows, since the mean is rounded: ``merge`` adds them one by one."""
        self._log = []

    def add(self, rows: Array) -> None:
        """Add finite rows, float32 (n, channels)."""
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].astype(np.float64, order="C")
            self._add_to_mean(part.sum(0), len(part))
            length = np.linalg.norm(part, axis=1, keepdims=True)
            part *= _STEPS / np.maximum(length, np.finfo(np.float64).tiny * _STEPS)
            self._wait(np.rint(part).astype(np.float32))  # integers up to 2^18: exact

    def merge(self, later: MomentSum) -> None:
        """Add what another one has seen."""
        later._multiply()
        if later._second is not None:
            self._multiply()
            for rows, count in later._log or [(later._rows, later._count)]:
                self._add_to_mean(rows, count)
            own = self._writable(later._rows.size)
            own += later._second
            self._store(own)

    def total(self) -> Moments:
        """The moments of all rows; raises ValueError where there are none."""
        self._multiply()
        if self._second is None:
            raise ValueError("no values were seen")
        channels = self._rows.size
        second = np.empty((channels, channels), np.float32)
        for start, stop, block in _blocks(self._second, channels):
            second[start:stop, start:] = block / _STEPS**2
            second[start:, start:stop] = second[start:stop, start:].T
        second = second if self.keep is None else self.keep(second)
        return Moments(second, (self._rows / self._count).astype(np.float32), self._count)

    def state(self) -> dict[str, Array]:
        """The sums, for a checkpoint; empty where there are none."""
        self._multiply()
        if self._second is None:
            return {}
        self._lent = True
        count = np.array(self._count, np.int64)
        state = {"second_moments": self._second, "row_sum": self._rows.copy(), "row_count": count}
        if self._log:
            sums, counts = zip(*self._log, strict=True)
            state |= {"row_sums": np.array(sums), "row_counts": np.array(counts, np.int64)}
        return state

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from ``state``. Raises ValueError or KeyError where it holds no sums."""
        second, rows, count = (state[k] for k in ("second_moments", "row_sum", "row_count"))
        if rows.ndim != 1 or second.shape != (_size(rows.size),):
            raise ValueError(f"moments of {rows.shape} channels have shape {second.shape}")
        self._second, self._lent = second, True
        self._rows, self._count = rows, int(count)
        if "row_sums" in state:
            sums, counts = state["row_sums"], state["row_counts"].tolist()
            self._log = list(zip(sums, counts, strict=True))

    def _add_to_mean(self, rows: Array, count: int) -> None:
        self._rows = self._rows + rows if self._count else rows
        self._count += count
        if self._log is not None:
            self._log.append((rows, count))

    def _wait(self, steps: Array) -> None:
        """Rows, in steps of the grid, wait until there are enough for one matrix multiplication."""
        self._waiting.append(steps)
        if sum(len(w) for w in self._waiting) >= _ROWS:
            self._multiply()
        elif self.keep is not None:
            self._waiting = [self.keep(np.concatenate(self._waiting))]

    def _multiply(self) -> None:
        """Add the moments of the rows that wait."""
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting, dtype=np.float64)
        self._waiting = []
        second = self._writable(rows.shape[1])
        for start, stop, block in _blocks(second, rows.shape[1]):
            block += rows[:, start:stop].T @ rows[:, start:]
        self._store(second)

    def _writable(self, channels: int) -> Array:
        """The sums so far, to be changed in place and stored."""
        if self._second is None:
            return np.zeros(_size(channels))
        owned = self._second.flags.writeable and not self._lent
        return self._second if owned else np.array(self._second)

    def _store(self, second: Array) -> None:
        self._second, self._lent = second if self.keep is None else self.keep(second), False


def _blocks(triangle: Array, channels: int) -> Iterator[tuple[int, int, Array]]:
    """Block rows from the diagonal on: first channel, end, and a view (end - first, rest)."""
    at = 0
    for start in range(0, channels, _BLOCK):
        stop = min(start + _BLOCK, channels)
        shape = stop - start, channels - start
        yield start, stop, triangle[at : at + shape[0] * shape[1]].reshape(shape)
        at += shape[0] * shape[1]


def _size(channels: int) -> int:
    """Values in all blocks on and above the diagonal."""
    starts = range(0, channels, _BLOCK)
    return sum((min(start + _BLOCK, channels) - start) * (channels - start) for start in starts)
