"""Calibrated ranges of tensors, and requests for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from qcompile.quant.types import QSpec, Range

# From so many values on, the extrema seen are taken as they are.
ENOUGH_VALUES = 1 << 10


def widened(span: Range, values: int) -> Range:
    """The range that ``ENOUGH_VALUES`` values would have, from one of fewer ``values``.

    Few values do not show how far a tensor reaches, and what lies outside is clipped. The extrema
    of n values whose density falls exponentially are log(n) from the middle, up to a constant
    (Gumbel's law), so both ends move away from the middle by that ratio. None moves across zero.
    """
    times = math.log(ENOUGH_VALUES) / math.log(min(max(values, 2), ENOUGH_VALUES))
    margin = (times - 1) * (span.hi - span.lo) / 2
    lo = np.where(span.lo < 0, span.lo - margin, np.maximum(span.lo - margin, 0))
    hi = np.where(span.hi > 0, span.hi + margin, np.minimum(span.hi + margin, 0))
    return Range(lo, hi, span.axis)


@dataclass(frozen=True)
class StatRequest:
    """A request for the range of one tensor, per tensor or per channel along an axis.

    ``extrema``: the smallest and largest value, whatever the calibrator is.
    """

    tensor: str
    spec: QSpec
    extrema: bool = False

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.granularity == "channel" else None


@dataclass
class Ranges:
    """Calibrated ranges by tensor name, filled once by the collector."""

    found: dict[str, Range] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # tensor -> why it has no range

    def get(self, tensor: str) -> Range | None:
        """The range of a tensor, None where none was collected."""
        return self.found.get(tensor)

    def set(self, tensor: str, span: Range) -> None:
        self.found[tensor] = span

    def drop(self, tensor: str) -> None:
        """Remove the range of a tensor that was removed or changed."""
        self.found.pop(tensor, None)
