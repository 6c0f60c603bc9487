"""The observer that all others extend: exact minimum and maximum, checks, lawful merging.

State is one entry per channel; a tensor with a single range is treated as one channel, so shapes
inside are always ``(n, channels)`` for values and ``(channels,)`` for statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from qcompile.quant import Array, Floats, Observer, QSpec, Range

_NOTHING: Floats = np.empty(0, np.float32)


class ExtremaObserver(Observer):
    """Minimum and maximum of everything seen, in the tensor's own units.

    ``rule`` is the calibrator that made the observer: observers whose rule and spec are equal may
    be merged. ``lo`` and ``hi`` have shape ``(channels,)``, or ``(0,)`` while nothing was seen.
    Subclasses add to ``_record``, ``_absorb`` and ``_bounds``, and to ``kept``, the attributes that
    change with what is seen: arrays, or whole numbers.
    """

    kept: ClassVar[tuple[str, ...]] = ("lo", "hi")

    def __init__(self, rule: object, spec: QSpec) -> None:
        self.rule = rule
        self.spec = spec
        self.lo = self.hi = _NOTHING

    @property
    def empty(self) -> bool:
        """True where no value was seen."""
        return self.lo.size == 0

    def update(self, values: Array) -> None:
        """See a batch of finite float values: any shape, or ``(n, channels)`` where per channel.

        A batch without values changes nothing, not even a count of batches.
        """
        columns = self._columns(values)
        if columns.size == 0:
            return
        # adding +0.0 turns -0.0 into 0.0: equal states are then equal bytes, in any order
        lo, hi = columns.min(axis=0) + np.float32(0), columns.max(axis=0) + np.float32(0)
        if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
            raise ValueError("values hold NaN or infinity, expected finite values")
        self._widen(lo, hi)
        self._record(columns, lo, hi)

    def merge(self, later: Observer) -> None:
        """Take in what ``later``, of equal rule and spec, saw after this; ``later`` is kept."""
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
        """The attributes in ``kept`` as arrays."""
        return {name: np.asarray(getattr(self, name)) for name in self.kept}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Raises ValueError or KeyError where ``state`` is of another kind of observer."""
        for name in self.kept:
            own, found = np.asarray(getattr(self, name)), state[name]
            if (own.dtype, own.ndim) != (found.dtype, found.ndim):
                raise ValueError(f"{name} is {found.dtype} of rank {found.ndim}")
            setattr(self, name, found.item() if own.ndim == 0 else found.copy())

    def _record(self, columns: Floats, lo: Floats, hi: Floats) -> None:
        """Count a batch whose extrema are ``lo`` and ``hi``; called after ``self.lo`` widened."""

    def _absorb(self, later: Self) -> None:
        """Count what ``later`` saw; called after ``self.lo`` widened, never with it empty."""

    def _bounds(self) -> tuple[Array, Array]:
        """Lower and upper bound per channel."""
        return self.lo, self.hi

    def _columns(self, values: Array) -> Floats:
        """The batch as float32 ``(n, channels)``."""
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinity
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
