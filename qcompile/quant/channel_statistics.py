"""What was seen of the channels of one tensor, and how far they are expected to reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.quant.types import Array

_TAIL_ROWS = 8
FEWEST_ROWS = 4 * _TAIL_ROWS  # samples with fewer say nothing of single channels


@dataclass(frozen=True)
class ChannelStats:
    """One tensor's channels (last axis): extrema over all data, and a sample of rows.

    Shapes: ``lo`` and ``hi`` (channels,), ``rows`` (n, channels), float32; a row is one position
    (token). Rows that ``attention_mask`` marks as padding are not among them. ``reach``: extrema
    over text beside the data, lowest and highest, (channels,) each; they count where unseen values
    are foreseen, and nowhere else.
    """

    lo: Array
    hi: Array
    rows: Array
    reach: tuple[Array, Array] | None = None

    @property
    def width(self) -> Array:
        """Largest magnitude of each channel, (channels,)."""
        widest: Array = np.maximum(-self.lo, self.hi)
        return widest

    @property
    def tail(self) -> Array:
        """How heavy each channel's tail is, (channels,): its maximum grows as ``n ** tail``.

        Hill's estimator (1975) over the largest rows of the sample. Few rows say little about one
        channel, so the mean of all channels is a bound and half of the estimate: what hardly moves,
        as an outlier with one value, keeps a short tail. A handful of rows says nothing.
        """
        count = _TAIL_ROWS
        if len(self.rows) < FEWEST_ROWS:
            return np.zeros(len(self.lo))
        sizes = np.abs(self.rows)
        largest = np.sort(np.partition(sizes, -count - 1, axis=0)[-count - 1 :], axis=0)
        largest = largest.astype(np.float64)
        logs = np.log(np.maximum(largest, np.finfo(np.float32).tiny))
        own = np.clip((logs[1:] - logs[0]).mean(0), 0, 1)
        common = own.mean()
        tail: Array = (np.minimum(own, common) + common) / 2
        return tail

    def foreseen(self, doublings: float) -> ChannelStats:
        """Extrema to expect once the data has doubled so many times; the sample as it is.

        Text beside the data stands for half of the doublings: what is new in unseen text, it has
        mostly shown (docs/accuracy.md has what that gains).
        """
        left = doublings if self.reach is None else doublings / 2
        margin = (2.0 ** (self.tail * left)).astype(np.float32)
        lo, hi = self.lo * margin, self.hi * margin
        if self.reach is not None:
            lo, hi = np.minimum(lo, self.reach[0]), np.maximum(hi, self.reach[1])
        return ChannelStats(lo, hi, self.rows)

    def scaled(self, factor: Array) -> ChannelStats:
        """The statistics of ``x * factor``, a positive factor for each channel."""
        reach = self.reach and (self.reach[0] * factor, self.reach[1] * factor)
        return ChannelStats(self.lo * factor, self.hi * factor, self.rows * factor, reach)

    def permuted(self, order: Array) -> ChannelStats:
        """The statistics of ``x[..., order]``."""
        reach = self.reach and (self.reach[0][order], self.reach[1][order])
        return ChannelStats(self.lo[order], self.hi[order], self.rows[:, order], reach)
