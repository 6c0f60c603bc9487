"""The base observer: exact minimum and maximum, checks of the values, associative merging.

State is one entry per channel; a tensor with a single range is treated as one channel, so shapes
inside are always ``(n, channels)`` for values and ``(channels,)`` for statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from qcompile.quant import Array, Floats, Observer, QSpec, Range

_NO_VALUES: Floats = np.empty(0, np.float32)


class ExtremaObserver(Observer):
    """Minimum and maximum of everything seen, in the tensor's own units.

    ``rule`` is the calibrator that made the observer: observers whose rule and spec are equal may
    be merged. ``lo`` and ``hi`` have shape ``(channels,)``, or ``(0,)`` while nothing was seen.
    Subclasses extend ``_record``, ``_absorb`` and ``_bounds``, and ``state_fields``: the attributes
    that depend on the values seen, each an array or an int.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("lo", "hi")

    def __init__(self, rule: object, spec: QSpec) -> None:
        self.rule = rule
        self.spec = spec
        self.lo = self.hi = _NO_VALUES

    @property
    def empty(self) -> bool:
        """True where no value was seen."""
        return self.lo.size == 0

    def update(self, values: Array) -> None:
        """Record a batch of float values: any shape, or ``(n, channels)`` where per channel.

        A batch without values changes nothing, not even a count of batches. Raises ValueError for
        NaN, infinity and another shape or number of channels.
        """
        columns = self._columns(values)
        if columns.size == 0:
            return
        # adding +0.0 turns -0.0 into 0.0, so that equal states have equal bytes in any order
        lo, hi = columns.min(axis=0) + np.float32(0), columns.max(axis=0) + np.float32(0)
        if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
            raise ValueError("values hold NaN or infinity, expected finite values")
        self._widen(lo, hi)
        self._record(columns, lo, hi)

    def merge(self, later: Observer) -> None:
        """Add what ``later`` recorded after this observer; ``later`` does not change.

        Raises ValueError unless both have the same type, rule and spec.
        """
        other = self._same_kind(later)
        if other.empty:
            return
        self._widen(other.lo, other.hi)
        self._absorb(other)

    def range(self) -> Range:
        """The range to quantize, float64; raises ValueError where nothing was seen."""
        if self.empty:
            raise ValueError("no values seen")
        lo, hi = self._bounds()
        if self.spec.axis is None:
            return Range(lo[0], hi[0])
        return Range(lo, hi, self.spec.axis)

    def state(self) -> dict[str, Array]:
        """The attributes in ``state_fields`` as arrays."""
        return {name: np.asarray(getattr(self, name)) for name in self.state_fields}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over a saved state. Raises ValueError or KeyError for another kind of observer's."""
        for name in self.state_fields:
            own, stored = np.asarray(getattr(self, name)), state[name]
            if (own.dtype, own.ndim) != (stored.dtype, stored.ndim):
                raise ValueError(f"{name} is {stored.dtype} of rank {stored.ndim}")
            setattr(self, name, stored.item() if own.ndim == 0 else stored.copy())

    def _record(self, columns: Floats, lo: Floats, hi: Floats) -> None:
        """Record a batch with extrema ``lo`` and ``hi``; ``self.lo``, ``self.hi`` include them."""

    def _absorb(self, later: Self) -> None:
        """Add what ``later``, never empty, saw; ``self.lo``, ``self.hi`` include its extrema."""

    def _bounds(self) -> tuple[Array, Array]:
        """Lower and upper bound per channel."""
        return self.lo, self.hi

    def _columns(self, values: Array) -> Floats:
        """The batch as float32 ``(n, channels)``."""
        with np.errstate(over="ignore"):  # overflow becomes infinity, which update refuses
            columns: Floats = np.asarray(values, np.float32)
        if self.spec.axis is None:
            return columns.reshape(-1, 1)
        if columns.ndim != 2:
            raise ValueError(f"found values of shape {columns.shape}, expected (n, channels)")
        return columns

    def _widen(self, lo: Floats, hi: Floats) -> None:
        if self.empty:
            self.lo, self.hi = lo, hi
            return
        if lo.shape != self.lo.shape:
            raise ValueError(f"found {lo.size} channels, expected {self.lo.size} as before")
        self.lo, self.hi = np.minimum(self.lo, lo), np.maximum(self.hi, hi)

    def _same_kind(self, later: Observer) -> Self:
        if not isinstance(later, type(self)):
            expected = type(self).__name__
            raise ValueError(f"cannot merge: found {type(later).__name__}, expected {expected}")
        if later.rule != self.rule or later.spec != self.spec:
            found, expected = f"{later.rule} {later.spec}", f"{self.rule} {self.spec}"
            raise ValueError(f"cannot merge: found {found}, expected {expected}")
        return later
