"""Entropy: the clipping threshold that loses least information, by Kullback-Leibler divergence.

Source: Migacz, "8-bit Inference with TensorRT" (GTC 2017, s7310), also behind ONNX Runtime's
``EntropyCalibrater``. Over a histogram of |x|, for each threshold t at a bin edge:

    P = the bins below t, with all that is clipped added to the last one
    Q = the bins below t (nothing added) in L groups, each spread evenly over its non-empty bins

and the t with the smallest KL(P || Q) wins; the range is [-t, t], cut to [min, max]. L is the
number of integers that t is divided into: 128 for int8, 256 where an asymmetric type sees values of
one sign only. As there, thresholds start at L bins, of at most 2048. Unlike there, groups differ by
at most one bin (a remainder left to the last group distorts KL), and all thresholds are weighed at
once: as Q is constant on a group, KL needs only prefix sums of counts at the group borders.

With as many integers as bins (16-bit types) no threshold loses anything and nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.calibrators._histogram import Bins, HistogramCalibrator, Ints
from qcompile.quant import Array, QSpec

_MOST_BINS = 2048
# A bin that Q leaves empty under mass of P counts as this part of a value, as in ONNX Runtime.
_EMPTY = 1e-4


def _magnitudes(bins: Bins) -> tuple[Ints, float]:
    """Counts of |x| from 0 up, at most 2048 of them, and the width of a bin."""
    index = bins.first + np.arange(bins.counts.size)
    mirrored = np.where(index < 0, ~index, index)  # [-1, 0) lies as far out as [0, 1)
    joins = 0
    while int(mirrored.max()) >> joins >= _MOST_BINS:
        joins += 1
    mirrored >>= joins
    counts = np.zeros(int(mirrored.max()) + 1, np.int64)
    np.add.at(counts, mirrored, bins.counts)
    return counts, bins.width * 2**joins


def _prefix(x: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(x)])


def _xlogx(x: Array) -> Array:
    return x * np.log(np.where(x > 0, x, 1.0))


def divergences(counts: Array, levels: int, cuts: Ints) -> Array:
    """KL(P || Q) in nats for each threshold: ``cuts`` are numbers of bins kept, from ``levels`` up.

    Shapes: counts ``(bins,)``, cuts and result ``(cuts,)``. Infinite where all values are clipped.
    """
    mass, used = _prefix(counts), _prefix(counts > 0)
    last, kept = counts[cuts - 1], mass[cuts]
    clipped = mass[-1] - kept
    borders = np.arange(levels + 1) * cuts[:, None] // levels
    q, cells = np.diff(mass[borders]), np.diff(used[borders])
    p = q.copy()
    p[:, -1] += clipped
    cells[:, -1] += (last == 0) & (clipped > 0)  # the bin that is not empty only in P
    cross = (p * np.log(np.maximum(q, _EMPTY) / np.maximum(cells, 1))).sum(axis=1)
    own = _prefix(_xlogx(counts))[cuts - 1] + _xlogx(last + clipped)
    divergence = (own - cross) / mass[-1] + np.log(np.maximum(kept, _EMPTY) / mass[-1])
    return np.where(kept > 0, divergence, np.inf)


@dataclass(frozen=True)
class Entropy(HistogramCalibrator):
    """Clip symmetrically where KL divergence is least; ``bins`` bounds memory, a power of two."""

    bins: int = 8192

    name: ClassVar[str] = "entropy"

    def clip(self, bins: Bins, spec: QSpec) -> tuple[float, float]:
        """The range ``[-t, t]``, cut to the values seen, in the tensor's units."""
        counts, width = _magnitudes(bins)
        q_min, q_max = spec.limits
        folded = spec.symmetric or bins.lo < 0 < bins.hi
        levels = (q_max - q_min + 1) // 2 if folded else q_max - q_min + 1
        if levels >= counts.size:
            return bins.lo, bins.hi
        # from the widest, so that of equal thresholds the one that clips least is taken
        cuts = np.arange(counts.size, levels - 1, -1)
        threshold = float(cuts[np.argmin(divergences(counts, levels, cuts))]) * width
        return max(bins.lo, -threshold), min(bins.hi, threshold)
