"""Percentile: the range holds the central ``percentile`` percent of the values.

Each tail loses half of the rest: with 99.99 the range is from the 0.005th to the 99.995th
percentile. Both ends move, as in ``PercentileCalibrater`` of ONNX Runtime for asymmetric types
(``percent_to_cut_one_side = (100 - percentile) / 200``). NVIDIA's pytorch-quantization takes the
percentile of |x| instead, which wastes half of an asymmetric range. Values are assumed to be spread
evenly over their bin, so each end is within one bin of the exact percentile, and inside [min, max].

Source: McKinstry et al. 2018 (arXiv 1809.04191), Wu et al. 2020 (arXiv 2004.09602).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.calibrators._histogram import Bins, HistogramCalibrator, Ints
from qcompile.quant import QSpec


def _depth(counts: Ints, tail: float) -> float:
    """How many bins from the start hold ``tail`` values; the fraction is the place in the last one.

    Empty bins that follow are included: a range gains nothing by covering them.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    last = int(np.searchsorted(below, tail, side="right")) - 1
    return last + (tail - float(below[last])) / float(counts[last])


@dataclass(frozen=True)
class Percentile(HistogramCalibrator):
    """Clip both tails: ``percentile`` percent of the values, over 50 to 100, stay inside.

    ``bins`` bounds memory and resolution: a power of two.
    """

    percentile: float = 99.99
    bins: int = 8192

    name: ClassVar[str] = "percentile"

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"found percentile {self.percentile}, expected one in (50, 100]")
        super().__post_init__()

    def clip(self, bins: Bins, spec: QSpec) -> tuple[float, float]:
        """Both percentiles, in the tensor's units; ``spec`` is not used."""
        total = int(bins.counts.sum())
        # 100 - 99.99 is not exact: a tail of 0.9999999 values must count as 1
        tail = round(total * (100 - self.percentile) / 200, 6)
        size = bins.counts.size
        ends = [_depth(bins.counts, tail), size - _depth(bins.counts[::-1], tail)]
        # the outer bins end at the extrema: their values are spread over the part inside
        edges = np.clip(bins.edges, bins.lo, bins.hi)
        lo, hi = np.interp(ends, np.arange(size + 1), edges)
        return float(lo), float(hi)
