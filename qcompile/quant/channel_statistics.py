"""Statistics of the channels of one tensor, and their extrapolation to more data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qcompile.quant.types import Array

_TAIL_ROWS = 8
FEWEST_ROWS = 4 * _TAIL_ROWS  # a sample with fewer rows is too small for statements on one channel


@dataclass(frozen=True)
class ChannelStats:
    """One tensor's channels (last axis): extrema over all data, and a sample of rows.

    Shapes: ``lo`` and ``hi`` (channels,), ``rows`` (n, channels), float32; a row is one position
    (token); padding by ``attention_mask`` is excluded. ``background_extrema``: minima and maxima,
    (channels,) each, over text that is run in addition to the data; only ``extrapolated`` uses
    them.

    Where a pass asked for them, over ``count`` rows, all of the data and of that text: ``moments``,
    (channels, channels), the sum of x xᵀ / |x|², and ``mean``, (channels,), that of x; float32.
    |x| is the length of the row as it was observed, also after ``scaled``: a row keeps its weight.

    ``rows`` and ``moments`` are stored in C order, as in a file, whatever order is given: BLAS and
    numpy add in another order where the layout differs.
    """

    lo: Array
    hi: Array
    rows: Array
    background_extrema: tuple[Array, Array] | None = None
    moments: Array | None = None
    mean: Array | None = None
    count: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", _in_c_order(self.rows))
        object.__setattr__(self, "moments", _map(self.moments, _in_c_order))

    @property
    def width(self) -> Array:
        """Largest magnitude of each channel, (channels,)."""
        widest: Array = np.maximum(-self.lo, self.hi)
        return widest

    @property
    def tail(self) -> Array:
        """Tail index of each channel, (channels,): the maximum of n rows grows as ``n ** tail``.

        Hill's estimator (1975) over the largest rows of the sample. One channel's estimate is
        noisy, so it is limited to the mean of all channels and averaged with it: a channel that is
        nearly constant, such as an outlier with one value, keeps a short tail. 0 for all channels
        where the sample has fewer than ``FEWEST_ROWS`` rows.
        """
        count = _TAIL_ROWS
        if len(self.rows) < FEWEST_ROWS:
            return np.zeros(len(self.lo))
        sizes = np.abs(self.rows)
        largest = np.sort(np.partition(sizes, -count - 1, axis=0)[-count - 1 :], axis=0)
        largest = largest.astype(np.float64)
        # Hill: mean log excess of the largest rows over the next smaller one.
        logs = np.log(np.maximum(largest, np.finfo(np.float32).tiny))
        own = np.clip((logs[1:] - logs[0]).mean(0), 0, 1)
        common = own.mean()
        tail: Array = (np.minimum(own, common) + common) / 2
        return tail

    def extrapolated(self, doublings: float) -> ChannelStats:
        """Extrema to expect from ``2 ** doublings`` times as much data; the sample is unchanged.

        The result is for ranges: it has no moments.

        Where there are background extrema, the tails count for half of the doublings only: the
        background text already shows most of what is new in unseen text (docs/accuracy.md).
        """
        tail_doublings = doublings if self.background_extrema is None else doublings / 2
        margin = (2.0 ** (self.tail * tail_doublings)).astype(np.float32)
        lo, hi = self.lo * margin, self.hi * margin
        if self.background_extrema is not None:
            lowest, highest = self.background_extrema
            lo, hi = np.minimum(lo, lowest), np.maximum(hi, highest)
        return ChannelStats(lo, hi, self.rows)

    def scaled(self, factor: Array) -> ChannelStats:
        """The statistics of ``x * factor``; ``factor``: positive, (channels,)."""
        old = self.background_extrema
        return replace(
            self,
            lo=self.lo * factor,
            hi=self.hi * factor,
            rows=self.rows * factor,
            background_extrema=old and (old[0] * factor, old[1] * factor),
            moments=_map(self.moments, lambda m: m * np.outer(factor, factor).astype(m.dtype)),
            mean=_map(self.mean, lambda m: m * factor),
        )

    def permuted(self, order: Array) -> ChannelStats:
        """The statistics of ``x[..., order]``; ``order``: a permutation of the channels."""
        old = self.background_extrema
        return replace(
            self,
            lo=self.lo[order],
            hi=self.hi[order],
            rows=self.rows[:, order],
            background_extrema=old and (old[0][order], old[1][order]),
            moments=_map(self.moments, lambda m: m[np.ix_(order, order)]),
            mean=_map(self.mean, lambda m: m[order]),
        )


def _in_c_order(values: Array) -> Array:
    """The values in C order; those that are, and views into files, stay the objects they are."""
    ordered: Array = np.asanyarray(values, order="C")
    return ordered


def _map(values: Array | None, change: Callable[[Array], Array]) -> Array | None:
    return None if values is None else change(values)
