"""Moving average: exponential averages of the minimum and of the maximum of each batch.

With momentum c and batch minima (or maxima) x_1 ... x_n, started at the first batch:

    A_1 = x_1,   A_i = c A_(i-1) + (1 - c) x_i

This alone cannot be merged, since A_1 is treated differently from the rest. Start from 0 instead:

    S_n = sum over i of (1 - c) c^(n-i) x_i,   and then   A_n = S_n + c^n x_1

because the weight of x_1 becomes (1 - c) c^(n-1) + c^n = c^(n-1), as it is in A_n. The triples
(n, S, x_1) form a monoid: (n, S, x)(m, T, y) = (n + m, c^m S + T, x). Order matters, grouping does
not: it only changes the float64 rounding of S, which rounding the result to float32 hides unless
averages of opposite sign cancel. An observer that is prepared to be merged keeps the extrema of its
batches, and ``merge`` appends them one by one: then grouping does not change a bit.

Source: momentum 0.9 as ``running_minmax`` in Qualcomm's transformer-quantization (where, by
mistake, only the last batch counts); averaged activation ranges go back to Jacob et al. 2018 (arXiv
1712.05877), section 3.1. Exceptional batches get less weight than in min-max. One update is one
batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np

from qcompile.calibrators._extrema import ExtremaObserver
from qcompile.quant import Array, Calibrator, Floats, QSpec


class MovingAverageObserver(ExtremaObserver):
    """Averages of per-batch extrema: ``total`` and ``first`` are float64 ``(2, channels)``.

    ``kept``: extrema of each batch, float64 ``(batches, 2, channels)``, if it will be merged.
    """

    state_fields: ClassVar[tuple[str, ...]] = (
        *ExtremaObserver.state_fields,
        "batches",
        "total",
        "first",
        "kept",
    )

    def __init__(self, rule: MovingAverage, spec: QSpec) -> None:
        super().__init__(rule, spec)
        self.momentum = rule.momentum
        self.batches = 0
        self.total: Array = np.zeros((2, 1))
        self.first: Array = np.zeros((2, 1))
        self.kept: Array = np.zeros((0, 2, 1))
        self._keeps = False

    def prepare_to_merge(self) -> None:
        """Keep the extrema of each batch."""
        self._keeps = True

    def _record(self, columns: Floats, lo: Floats, hi: Floats) -> None:
        self._add(np.stack([lo, hi]).astype(np.float64))

    def _absorb(self, later: Self) -> None:
        if len(later.kept) == later.batches:
            for batch in later.kept:
                self._add(batch)
        else:
            self._append(later.batches, later.total, later.first)

    def _add(self, batch: Array) -> None:
        self._append(1, (1 - self.momentum) * batch, batch)
        if self._keeps:
            self.kept = np.concatenate([self.kept.reshape(-1, *batch.shape), batch[None]])

    def _append(self, batches: int, total: Array, first: Array) -> None:
        """Combine this triple with the later ``(batches, total, first)``, as in the module text."""
        self.first = self.first if self.batches else first
        self.total = self.momentum**batches * self.total + total
        self.batches += batches

    def _bounds(self) -> tuple[Array, Array]:
        averages = self.total + self.momentum**self.batches * self.first
        lo, hi = np.clip(averages.astype(np.float32), self.lo, self.hi)
        return lo + np.float32(0), hi + np.float32(0)  # + 0: clip may return -0.0


@dataclass(frozen=True)
class MovingAverage(Calibrator):
    """Exponential moving average of batch extrema; ``momentum`` in [0, 1) weights the past."""

    momentum: float = 0.9

    name: ClassVar[str] = "moving-average"
    needs: ClassVar[Literal["extrema", "values"]] = "extrema"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"found momentum {self.momentum}, expected a number in [0, 1)")

    def observer(self, spec: QSpec) -> MovingAverageObserver:
        """A fresh observer; the order of its batches matters."""
        return MovingAverageObserver(self, spec)
