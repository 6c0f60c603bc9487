"""Entropy: the clipping threshold that loses least information, by Kullback-Leibler divergence.

Source: Migacz, "8-bit Inference with TensorRT" (GTC 2017, s7310), also behind ONNX Runtime's
``EntropyCalibrater``. Over a histogram of |x|, for each threshold t at a bin edge:

    P = the bins below t, with all that is clipped added to the last one
    Q = the bins below t (nothing added) in L groups, each spread evenly over its non-empty bins

and the t with the smallest KL(P || Q) is chosen; the range is [-t, t], limited to [min, max]. L is
the number of quantized levels in [0, t]: 128 for int8, 256 where an asymmetric type sees values of
one sign only. As in ONNX Runtime, thresholds start at L bins, of at most 2048. Unlike there, groups
differ by at most one bin (a remainder left to the last group distorts KL), and all thresholds are
evaluated at once: Q is constant on a group, so KL needs only prefix sums at the group borders.

With as many levels as bins (16-bit types) no threshold loses anything and nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.calibrators._histogram import Bins, HistogramCalibrator, Ints
from qcompile.quant import Array, QSpec

_MOST_BINS = 2048
# Count that stands for 0 in a bin that is empty in Q but not in P, as in ONNX Runtime.
_EMPTY = 1e-4


def _magnitudes(bins: Bins) -> tuple[Ints, float]:
    """Counts of |x| in at most 2048 bins from 0 up, and the width of a bin."""
    index = bins.first + np.arange(bins.counts.size)
    mirrored = np.where(index < 0, ~index, index)  # [-1, 0) has the magnitudes of [0, 1)
    doublings = 0
    while int(mirrored.max()) >> doublings >= _MOST_BINS:
        doublings += 1
    mirrored >>= doublings
    counts = np.zeros(int(mirrored.max()) + 1, np.int64)
    np.add.at(counts, mirrored, bins.counts)
    return counts, bins.width * 2**doublings


def _prefix_sums(x: Array) -> Array:
    """``(n + 1,)``: the sums of the first 0 to n entries."""
    return np.concatenate([[0.0], np.cumsum(x)])


def _xlogx(x: Array) -> Array:
    return x * np.log(np.where(x > 0, x, 1.0))


def divergences(counts: Array, levels: int, sizes: Ints) -> Array:
    """KL(P || Q) in nats for each threshold; ``sizes``: numbers of bins kept, from ``levels`` up.

    Shapes: counts ``(bins,)``, sizes and result ``(n,)``. Infinite where all values are clipped.
    """
    mass, nonempty = _prefix_sums(counts), _prefix_sums(counts > 0)
    last, inside = counts[sizes - 1], mass[sizes]
    clipped = mass[-1] - inside
    # counts and non-empty bins of each of the L groups, for each threshold: (n, levels)
    borders = np.arange(levels + 1) * sizes[:, None] // levels
    q, cells = np.diff(mass[borders]), np.diff(nonempty[borders])
    p = q.copy()
    p[:, -1] += clipped
    cells[:, -1] += (last == 0) & (clipped > 0)  # the last bin is not empty in P alone
    # sum of P log Q and of P log P in counts, then KL of the two distributions
    p_log_q = (p * np.log(np.maximum(q, _EMPTY) / np.maximum(cells, 1))).sum(axis=1)
    p_log_p = _prefix_sums(_xlogx(counts))[sizes - 1] + _xlogx(last + clipped)
    divergence = (p_log_p - p_log_q) / mass[-1] + np.log(np.maximum(inside, _EMPTY) / mass[-1])
    return np.where(inside > 0, divergence, np.inf)


@dataclass(frozen=True)
class Entropy(HistogramCalibrator):
    """Clip symmetrically where KL divergence is least; ``bins`` bounds memory, a power of two."""

    bins: int = 8192

    name: ClassVar[str] = "entropy"

    def clip(self, bins: Bins, spec: QSpec) -> tuple[float, float]:
        """The range ``[-t, t]``, limited to the values seen, in the tensor's units."""
        counts, width = _magnitudes(bins)
        q_min, q_max = spec.limits
        two_sided = spec.symmetric or bins.lo < 0 < bins.hi
        levels = (q_max - q_min + 1) // 2 if two_sided else q_max - q_min + 1
        if levels >= counts.size:
            return bins.lo, bins.hi
        # widest first: among equal divergences, argmin takes the threshold that clips least
        sizes = np.arange(counts.size, levels - 1, -1)
        threshold = float(sizes[np.argmin(divergences(counts, levels, sizes))]) * width
        return max(bins.lo, -threshold), min(bins.hi, threshold)
