"""Observes the channels of a tensor: their extrema over all data, and a sample of rows.

Rows are positions (tokens), channels are the last axis. Passes that choose scales per channel use
the extrema; passes that estimate the error of a matrix multiplication use the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.calibration.second_moments import MomentSum
from qcompile.quant import Array, ChannelStats, Observer, Range

ROWS = 1024
# Odd multipliers of Knuth's multiplicative hashing; any fixed values do.
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HASHED_CHANNELS = 32
# Keys of ``background_extrema`` in a saved state.
_BACKGROUND_KEYS = ("reach_lo", "reach_hi")


@dataclass
class ChannelObserver(Observer):
    """Extrema of each channel and at most ``limit`` rows, those with the smallest hash.

    A row's hash depends on its values alone, so the sample does not depend on how the data was
    split: a bottom-k sketch (Cohen and Kaplan 2007), which makes ``merge`` exact.
    ``moments``, where they are asked for, are of all rows, those of background text too.
    """

    limit: int = ROWS
    keep: Callable[[Array], Array] | None = None  # stores the sample between batches
    moments: MomentSum | None = None
    _seen: ChannelStats | None = None
    _background: tuple[Array, Array] | None = None
    _keys: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    _lent: bool = False  # a caller holds the rows: changes go into a copy

    def fits(self, values: Array) -> bool:
        """True where these rows have as many channels as those before."""
        extrema = None if self._seen is None else self._seen.lo
        if extrema is None and self._background is not None:
            extrema = self._background[0]
        return extrema is None or values.shape[1] == len(extrema)

    def update(self, values: Array) -> None:
        """Observe rows of calibration data, float (n, channels)."""
        if values.size:
            rows = np.asarray(values, np.float32)
            self._take(ChannelStats(rows.min(0), rows.max(0), rows), _keys(rows))
            self._add_moments(rows)

    def update_background(self, values: Array) -> None:
        """Observe rows, float (n, channels), of background text, for extrema and moments only.

        Batches with NaN or infinity are ignored.
        """
        if values.size and np.isfinite(values).all():
            rows = np.asarray(values, np.float32)
            self._extend((rows.min(0), rows.max(0)))
            self._add_moments(rows)

    def _add_moments(self, rows: Array) -> None:
        if self.moments is not None:
            self.moments.add(rows)

    def _extend(self, extrema: tuple[Array, Array]) -> None:
        old = self._background or extrema
        self._background = np.minimum(old[0], extrema[0]), np.maximum(old[1], extrema[1])

    def merge(self, later: Observer) -> None:
        """Add another sketch of the same tensor."""
        assert isinstance(later, ChannelObserver)
        if later._background is not None:
            self._extend(later._background)
        if later._seen is not None:
            self._take(later._in_order(), later._keys)
        if self.moments is not None:
            assert later.moments is not None
            self.moments.merge(later.moments)

    def _take(self, new: ChannelStats, keys: Array) -> None:
        old = self._seen or ChannelStats(new.lo, new.hi, new.rows[:0])
        lo, hi = np.minimum(old.lo, new.lo), np.maximum(old.hi, new.hi)
        rows = new.rows
        full = len(self._keys) == self.limit
        if full:  # skip rows that cannot enter the sample, most of a later batch
            fits = keys < self._keys.max()
            rows, keys = rows[fits], keys[fits]
        if len(keys):
            # The sample is the ``limit`` rows with the smallest hashes of old and new ones.
            all_keys = np.concatenate([self._keys, keys])
            kept = np.argsort(all_keys, kind="stable")[: self.limit]
            if full and self.keep is None:
                rows = self._replace(old.rows, rows, keys, kept)
            else:
                rows, self._keys = np.concatenate([old.rows, rows])[kept], all_keys[kept]
                rows = rows if self.keep is None else self.keep(rows)
        else:
            rows = old.rows
        self._seen = ChannelStats(lo, hi, rows)

    def _replace(self, rows: Array, new: Array, keys: Array, kept: Array) -> Array:
        """Overwrite the rows that leave the sample: in later batches these are few."""
        if self._lent:
            rows, self._keys, self._lent = rows.copy(), self._keys.copy(), False
        removed = np.setdiff1d(np.arange(len(rows)), kept, assume_unique=True)
        added = kept[kept >= len(rows)] - len(rows)
        rows[removed], self._keys[removed] = new[added], keys[added]
        return rows

    def _in_order(self) -> ChannelStats:
        """The statistics with rows sorted by hash: independent of how the data was split."""
        assert self._seen is not None
        order = np.argsort(self._keys, kind="stable")
        if (order[1:] < order[:-1]).any():
            self._seen = replace(self._seen, rows=self._seen.rows[order])
            self._keys = self._keys[order]
        self._lent = True
        return self._seen

    def range(self) -> Range:
        """Extrema per channel; raises ValueError where no values were observed."""
        stats = self.stats()
        return Range(stats.lo, stats.hi, -1)

    def state(self) -> dict[str, Array]:
        """Extrema, rows, their hashes and sums; empty where no values were observed."""
        if self._seen is None:
            return {}
        seen = self._in_order()
        state = {"lo": seen.lo, "hi": seen.hi, "rows": seen.rows, "keys": self._keys}
        if self._background is not None:
            state |= zip(_BACKGROUND_KEYS, self._background, strict=True)
        return state if self.moments is None else state | self.moments.state()

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from ``state``. Raises ValueError or KeyError where it is not a sketch."""
        if not state:
            return
        lo, hi, rows, keys = (state[name] for name in ("lo", "hi", "rows", "keys"))
        if lo.shape != hi.shape or rows.shape != (len(keys), *lo.shape) or len(keys) > self.limit:
            raise ValueError(f"a sketch of {len(keys)} rows has shape {rows.shape}")
        self._seen, self._keys = ChannelStats(lo, hi, rows), keys
        if _BACKGROUND_KEYS[0] in state:
            self._background = state[_BACKGROUND_KEYS[0]], state[_BACKGROUND_KEYS[1]]
        if self.moments is not None:
            self.moments.restore(state)

    def stats(self) -> ChannelStats:
        """The statistics of all data; raises ValueError where no values were observed."""
        if self._seen is None:
            raise ValueError("no values were seen")
        stats = replace(self._in_order(), background_extrema=self._background)
        if self.moments is None:
            return stats
        found = self.moments.total()
        return replace(stats, moments=found.second, mean=found.mean, count=found.count)


def _keys(rows: Array) -> Array:
    """A hash per row, uint64 (n,), over the bits of some evenly spaced channels."""
    step = max(1, rows.shape[1] // _HASHED_CHANNELS)
    bits = np.ascontiguousarray(rows[:, ::step]).view(np.uint32).astype(np.uint64)
    keys = np.zeros(len(rows), np.uint64)
    for column in bits.T:
        keys = (keys ^ column) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys
