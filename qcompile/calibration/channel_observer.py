"""What the channels of a tensor hold: extrema over all data, and a sample of its rows.

Rows are positions (tokens), channels the last axis. Passes that choose scales per channel read the
extrema; those that weigh the error of a product against float read the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.quant import Array, ChannelStats, Observer, Range

ROWS = 1024
# Odd multipliers of Knuth's multiplicative hashing; any fixed values do.
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HASHED_CHANNELS = 32
_REACH = ("reach_lo", "reach_hi")


@dataclass
class ChannelObserver(Observer):
    """Extrema of each channel and at most ``limit`` rows, those with the smallest hash.

    A row's hash depends on its values alone, so the sample does not depend on how the data was
    split: a bottom-k sketch (Cohen and Kaplan 2007), which makes ``merge`` exact.
    """

    limit: int = ROWS
    keep: Callable[[Array], Array] | None = None  # where the sample is put between batches
    _seen: ChannelStats | None = None
    _reach: tuple[Array, Array] | None = None
    _keys: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    _lent: bool = False  # others hold the rows: what comes next goes into a copy

    def fits(self, values: Array) -> bool:
        """Whether these rows have the channels of those seen before."""
        known = None if self._seen is None else self._seen.lo
        known = self._reach[0] if known is None and self._reach is not None else known
        return known is None or values.shape[1] == len(known)

    def update(self, values: Array) -> None:
        """See rows, float (n, channels)."""
        if values.size:
            rows = np.asarray(values, np.float32)
            self._take(ChannelStats(rows.min(0), rows.max(0), rows), _keys(rows))

    def foresee(self, values: Array) -> None:
        """See rows, float (n, channels), of text beside the data: only their extrema count."""
        if values.size and np.isfinite(values).all():
            rows = np.asarray(values, np.float32)
            self._extend((rows.min(0), rows.max(0)))

    def _extend(self, reach: tuple[Array, Array]) -> None:
        old = self._reach or reach
        self._reach = np.minimum(old[0], reach[0]), np.maximum(old[1], reach[1])

    def merge(self, later: Observer) -> None:
        """Take in another sketch of the same tensor."""
        assert isinstance(later, ChannelObserver)
        if later._reach is not None:
            self._extend(later._reach)
        if later._seen is not None:
            self._take(later._in_order(), later._keys)

    def _take(self, new: ChannelStats, keys: Array) -> None:
        old = self._seen or ChannelStats(new.lo, new.hi, new.rows[:0])
        lo, hi = np.minimum(old.lo, new.lo), np.maximum(old.hi, new.hi)
        rows = new.rows
        full = len(self._keys) == self.limit
        if full:  # most rows of later batches have no chance: copy none
            fits = keys < self._keys.max()
            rows, keys = rows[fits], keys[fits]
        if len(keys):
            every = np.concatenate([self._keys, keys])
            kept = np.argsort(every, kind="stable")[: self.limit]
            if full and self.keep is None:
                rows = self._replace(old.rows, rows, keys, kept)
            else:
                rows, self._keys = np.concatenate([old.rows, rows])[kept], every[kept]
                rows = rows if self.keep is None else self.keep(rows)
        else:
            rows = old.rows
        self._seen = ChannelStats(lo, hi, rows)

    def _replace(self, rows: Array, new: Array, keys: Array, kept: Array) -> Array:
        """New rows where those stood that are kept no longer: few change, so few are moved."""
        if self._lent:
            rows, self._keys, self._lent = rows.copy(), self._keys.copy(), False
        gone = np.setdiff1d(np.arange(len(rows)), kept, assume_unique=True)
        come = kept[kept >= len(rows)] - len(rows)
        rows[gone], self._keys[gone] = new[come], keys[come]
        return rows

    def _in_order(self) -> ChannelStats:
        """What was seen, rows by hash: their order does not depend on how the data was split."""
        assert self._seen is not None
        order = np.argsort(self._keys, kind="stable")
        if (order[1:] < order[:-1]).any():
            self._seen = replace(self._seen, rows=self._seen.rows[order])
            self._keys = self._keys[order]
        self._lent = True
        return self._seen

    def range(self) -> Range:
        """Extrema by channel; raises ValueError where nothing was seen."""
        stats = self.stats()
        return Range(stats.lo, stats.hi, -1)

    def state(self) -> dict[str, Array]:
        """The sketch: extrema, rows and their hashes; empty where nothing was seen."""
        if self._seen is None:
            return {}
        seen = self._in_order()
        made = {"lo": seen.lo, "hi": seen.hi, "rows": seen.rows, "keys": self._keys}
        return made if self._reach is None else made | dict(zip(_REACH, self._reach, strict=True))

    def restore(self, state: Mapping[str, Array]) -> None:
        """Raises ValueError or KeyError where ``state`` is no sketch."""
        if not state:
            return
        lo, hi, rows, keys = (state[name] for name in ("lo", "hi", "rows", "keys"))
        if lo.shape != hi.shape or rows.shape != (len(keys), *lo.shape) or len(keys) > self.limit:
            raise ValueError(f"a sketch of {len(keys)} rows has shape {rows.shape}")
        self._seen, self._keys = ChannelStats(lo, hi, rows), keys
        if _REACH[0] in state:
            self._reach = state[_REACH[0]], state[_REACH[1]]

    def stats(self) -> ChannelStats:
        """All that was seen; raises ValueError where nothing was."""
        if self._seen is None:
            raise ValueError("no values were seen")
        return replace(self._in_order(), reach=self._reach)


def _keys(rows: Array) -> Array:
    """One uint64 a row: a hash of the bits of channels spread over the whole row."""
    step = max(1, rows.shape[1] // _HASHED_CHANNELS)
    bits = np.ascontiguousarray(rows[:, ::step]).view(np.uint32).astype(np.uint64)
    keys = np.zeros(len(rows), np.uint64)
    for column in bits.T:
        keys = (keys ^ column) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys
