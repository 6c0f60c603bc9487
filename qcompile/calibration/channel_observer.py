"""Observes the channels of a tensor: their extrema over all data, and a sample of rows.

Rows are positions (tokens), channels are the last axis. Passes that choose scales per channel use
the extrema; passes that estimate the error of a matrix multiplication use the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from qcompile.calibration.second_moments import MomentSum
from qcompile.quant import Array, ChannelStats, Observer, Range

Ints = npt.NDArray[np.int64]
ROWS = 1024
# Odd multipliers of Knuth's multiplicative hashing; any fixed values do.
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HASHED_CHANNELS = 32
# Keys of ``background_extrema`` in a saved state.
_BACKGROUND_KEYS = ("reach_lo", "reach_hi")


@dataclass
class ChannelObserver(Observer):
    """Extrema of each channel and at most ``limit`` rows, those with the smallest hash.

    A row's hash depends on its values alone, and of equal hashes the earlier row comes first, so
    the sample does not depend on how the data was split: a bottom-k sketch (Cohen and Kaplan 2007),
    which makes ``merge`` exact. ``below``: only rows with a smaller hash can enter, where this
    sketch will be merged into one that is full.
    ``moments``, where they are asked for, are of all rows, those of background text too.
    """

    limit: int = ROWS
    keep: Callable[[Array], Array] | None = None  # stores the sample between batches
    moments: MomentSum | None = None
    below: int | None = None
    _seen: ChannelStats | None = None
    _background: tuple[Array, Array] | None = None
    _keys: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    _ages: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    _lent: bool = False  # a caller holds the rows: changes go into a copy

    @property
    def channels(self) -> int | None:
        """How many channels the rows have; None before the first one."""
        if self._seen is not None:
            return len(self._seen.lo)
        return None if self._background is None else len(self._background[0])

    @property
    def threshold(self) -> int | None:
        """The hash below which later rows can enter the sample; None while any can."""
        return int(self._keys.max()) if len(self._keys) == self.limit else None

    def sees_all(self, later: ChannelObserver, below: int) -> bool:
        """True if no row that ``later`` left out, with a hash of ``below`` or more, could be in the
        sample after merging: of equal hashes the rows here come first."""
        own = int(np.count_nonzero(self._keys <= np.uint64(below)))
        others = int(np.count_nonzero(later._keys < np.uint64(below)))
        return own + others >= self.limit

    def fits(self, values: Array) -> bool:
        """True where these rows have as many channels as those before."""
        return self.channels in (None, values.shape[1])

    def prepare_to_merge(self) -> None:
        """Keep what makes the mean of merged parts exact."""
        if self.moments is not None:
            self.moments.prepare_to_merge()

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
        least = [t for t in (self.threshold, self.below) if t is not None]
        rows = new.rows
        if least:  # skip rows that cannot enter the sample, most of a later batch
            fits = keys < np.uint64(min(least))
            rows, keys = rows[fits], keys[fits]
        self._seen = ChannelStats(lo, hi, self._sampled(old.rows, rows, keys))

    def _sampled(self, old: Array, new: Array, keys: Array) -> Array:
        """The ``limit`` rows with the smallest hashes of old and new ones."""
        if not len(keys):
            return old
        full = len(self._keys) == self.limit
        ages = int(self._ages.max(initial=-1)) + 1 + np.arange(len(keys))
        all_keys, all_ages = np.append(self._keys, keys), np.append(self._ages, ages)
        kept = np.lexsort((all_ages, all_keys))[: self.limit]
        if full and self.keep is None:
            return self._replace(old, new, all_keys, all_ages, kept)
        self._keys, self._ages = all_keys[kept], all_ages[kept]
        rows = np.concatenate([old, new])[kept]
        return rows if self.keep is None else self.keep(rows)

    def _replace(
        self, rows: Array, new: Array, all_keys: Array, all_ages: Array, kept: Array
    ) -> Array:
        """Overwrite the rows that leave the sample: in later batches these are few."""
        if self._lent:
            rows, self._keys, self._lent = rows.copy(), self._keys.copy(), False
        removed = np.setdiff1d(np.arange(len(rows)), kept, assume_unique=True)
        added = kept[kept >= len(rows)]
        rows[removed] = new[added - len(rows)]
        self._keys[removed], self._ages[removed] = all_keys[added], all_ages[added]
        return rows

    def _in_order(self) -> ChannelStats:
        """The statistics with rows sorted by hash, then age, however the data was split."""
        assert self._seen is not None
        order = np.lexsort((self._ages, self._keys))
        if (order[1:] < order[:-1]).any():
            self._seen = replace(self._seen, rows=self._seen.rows[order])
            self._keys, self._ages = self._keys[order], self._ages[order]
        self._lent = True
        return self._seen

    def range(self) -> Range:
        """Extrema per channel; raises ValueError where no values were observed."""
        stats = self.stats()
        return Range(stats.lo, stats.hi, -1)

    def state(self) -> dict[str, Array]:
        """Extrema, rows, their hashes and sums; empty where no values were observed."""
        state: dict[str, Array] = {}
        if self._seen is not None:
            seen = self._in_order()
            state = {"lo": seen.lo, "hi": seen.hi, "rows": seen.rows, "keys": self._keys}
        if self._background is not None:
            state |= zip(_BACKGROUND_KEYS, self._background, strict=True)
        return state if self.moments is None else state | self.moments.state()

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from ``state``. Raises ValueError or KeyError where it is not a sketch."""
        if not state:
            return
        if _BACKGROUND_KEYS[0] not in state or "keys" in state:  # else there was no other text
            lo, hi, rows, keys = (state[name] for name in ("lo", "hi", "rows", "keys"))
            if (lo.shape, (len(keys), *lo.shape)) != (hi.shape, rows.shape):
                raise ValueError(f"a sketch of {len(keys)} rows has shape {rows.shape}")
            if len(keys) > self.limit:
                raise ValueError(f"a sketch has {len(keys)} rows, expected {self.limit} at most")
            self._seen, self._keys = ChannelStats(lo, hi, rows), keys
            self._ages = np.arange(len(keys))
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
