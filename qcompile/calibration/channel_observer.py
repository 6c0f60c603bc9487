"""Observes the channels of a tensor: their extrema over all data, and a sample of rows.

Rows are positions (tokens), channels are the last axis. Passes that choose scales per channel use
the extrema; passes that estimate the error of a matrix multiplication use the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.calibration.row_sample import ROWS, RowSample
from qcompile.calibration.second_moments import MomentSum
from qcompile.errors import InvariantError
from qcompile.quant import Array, ChannelStats, Observer, Range

# Keys of ``background_extrema`` in a saved state.
_BACKGROUND_KEYS = ("reach_lo", "reach_hi")


@dataclass
class ChannelObserver(Observer):
    """Extrema of each channel, and a sample of at most ``limit`` rows.

    ``keep`` stores the sample. ``moments``, where they are asked for, are of all rows, those of
    background text too.
    """

    limit: int = ROWS
    keep: Callable[[Array], Array] | None = None
    moments: MomentSum | None = None
    sample: RowSample = field(init=False)
    _extrema: tuple[Array, Array] | None = None
    _background: tuple[Array, Array] | None = None

    def __post_init__(self) -> None:
        self.sample = RowSample(self.limit, self.keep)

    @property
    def channels(self) -> int | None:
        """How many channels the rows have; None before the first one."""
        known = self._extrema or self._background
        return None if known is None else len(known[0])

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
            self._extrema = _joined(self._extrema, (rows.min(0), rows.max(0)))
            self.sample.add(rows)
            self._add_moments(rows)

    def update_background(self, values: Array) -> None:
        """Observe rows, float (n, channels), of background text, for extrema and moments only.

        Batches with NaN or infinity are ignored.
        """
        if values.size and np.isfinite(values).all():
            rows = np.asarray(values, np.float32)
            self._background = _joined(self._background, (rows.min(0), rows.max(0)))
            self._add_moments(rows)

    def _add_moments(self, rows: Array) -> None:
        if self.moments is not None:
            self.moments.add(rows)

    def merge(self, later: Observer) -> None:
        """Add what was seen of later data of the same tensor."""
        assert isinstance(later, ChannelObserver)
        if later._background is not None:
            self._background = _joined(self._background, later._background)
        if later._extrema is not None:
            self._extrema = _joined(self._extrema, later._extrema)
            self.sample.merge(later.sample)
        if self.moments is not None:
            assert later.moments is not None
            self.moments.merge(later.moments)

    def range(self) -> Range:
        """Extrema per channel; raises ValueError where no values were observed."""
        stats = self.stats()
        return Range(stats.lo, stats.hi, -1)

    def state(self) -> dict[str, Array]:
        """Extrema, rows, their hashes, ``bound`` and sums; empty where no values were observed."""
        state: dict[str, Array] = {}
        if self._extrema is not None:
            (lo, hi), sample = self._extrema, self.sample
            state = {"lo": lo, "hi": hi, "rows": sample.rows, "keys": sample.keys}
            if sample.bound is not None:
                state["bound"] = np.array(sample.bound, np.uint64)
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
            self._extrema = lo, hi
            self.sample.restore(rows, keys, int(state["bound"]) if "bound" in state else None)
        if _BACKGROUND_KEYS[0] in state:
            self._background = state[_BACKGROUND_KEYS[0]], state[_BACKGROUND_KEYS[1]]
        if self.moments is not None:
            self.moments.restore(state)

    def stats(self) -> ChannelStats:
        """The statistics of all data.

        Raises ValueError where no values were observed, InvariantError where rows of the sample
        were left out.
        """
        if self._extrema is None:
            raise ValueError("no values were seen")
        if self.sample.lacks_rows:
            raise InvariantError("rows of a sample of channels were left out")
        stats = ChannelStats(*self._extrema, self.sample.rows, background_extrema=self._background)
        if self.moments is None:
            return stats
        found = self.moments.total()
        return replace(stats, moments=found.second, mean=found.mean, count=found.count)


def _joined(one: tuple[Array, Array] | None, other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Smallest and largest values of both."""
    if one is None:
        return other
    return np.minimum(one[0], other[0]), np.maximum(one[1], other[1])
