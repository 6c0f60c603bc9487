"""MSE: the clipping range with the smallest expected squared quantization error.

The error is that of the arithmetic used later: candidate ranges go through ``affine.qparams``, with
its widening to 0, rounded zero point and float32 scale. Values are assumed to be spread evenly over
their bin, and the squared error of rounding and saturation is integrated exactly. With n the
integer nearest to x / s, clipped to the limits of the type (relative to the zero point):

    F(x) = integral from 0 to x of (t - s n(t))^2 dt = n s^3 / 12 + (x - n s)^3 / 3

since each full step adds s^3 / 12; beyond the limits n is constant and the cube is the clipping
error. A bin [a, b) with count m adds m (F(b) - F(a)) / (b - a), whether it is wider than s or not.

Candidates shrink the extrema by factors, on a geometric grid refined twice around the best: both
ends jointly for asymmetric specs, the larger magnitude for symmetric ones.

Source: OMSE (Choukroun et al. 2019, arXiv 1902.06822), ACIQ (Banner et al. 2019, arXiv 1810.05723),
and the histogram searches of PyTorch's HistogramObserver and NVIDIA's pytorch-quantization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.calibrators._histogram import Bins, HistogramCalibrator
from qcompile.quant import Array, QSpec, Range, qparams

# Exponents of 2 by which an end is scaled: from 1 down to 1/181, then finer around the best so far.
_ROUNDS: tuple[Array, ...] = (
    -np.arange(16) / 2,
    np.arange(4, -5, -1) / 8,
    np.arange(4, -5, -1) / 40,
)
_TABLE = 1 << 15  # entries of the (candidates, edges) table evaluated at once: it stays in cache


def expected_error(bins: Bins, lo: Array, hi: Array, spec: QSpec) -> Array:
    """Sum of squared errors over all values for each range ``[lo[i], hi[i]]``: float64 ``(n,)``."""
    params = qparams(Range(lo, hi, axis=0), spec)
    scale = params.scale.astype(np.float64)[:, None]
    zero = params.zero_point.astype(np.float64)[:, None]
    q_min, q_max = spec.limits
    edges = bins.edges
    # summation by parts: sum of count * (F(b) - F(a)) / width as one weight per edge times F(edge)
    weights = -np.diff(bins.counts.astype(np.float64), prepend=0, append=0) / bins.width
    errors = np.empty(lo.size)
    step = max(1, _TABLE // edges.size)
    for start in range(0, lo.size, step):
        part = slice(start, start + step)
        least, most = q_min - zero[part], q_max - zero[part]
        errors[part] = _integral(edges, scale[part], least, most) @ weights
    return errors


def _integral(x: Array, scale: Array, least: Array, most: Array) -> Array:
    """F(x) of the module docstring: ``(candidates, 1)`` parameters, ``(edges,)`` positions."""
    n = np.clip(np.rint(x / scale), least, most)
    error = x - n * scale
    result: Array = n * (scale * scale * scale / 12) + error * error * error / 3
    return result


def _ranges(bins: Bins, spec: QSpec, low: Array, high: Array) -> tuple[Array, Array]:
    """Candidate bounds, inside [min, max]: the ends times 2 to the power of ``low``, ``high``."""
    if spec.symmetric:
        bound = max(-bins.lo, bins.hi) * 2.0**high
        return np.clip(-bound, bins.lo, bins.hi), np.clip(bound, bins.lo, bins.hi)
    lo = bins.lo * 2.0**low if bins.lo < 0 else np.full(low.shape, bins.lo)
    hi = bins.hi * 2.0**high if bins.hi > 0 else np.full(high.shape, bins.hi)
    return np.minimum(lo, bins.hi), np.maximum(hi, bins.lo)


@dataclass(frozen=True)
class Mse(HistogramCalibrator):
    """Clip where the expected squared error is smallest; ``bins`` bounds memory, a power of two."""

    bins: int = 8192

    name: ClassVar[str] = "mse"

    def clip(self, bins: Bins, spec: QSpec) -> tuple[float, float]:
        """The range with the least error, in the tensor's units; among equals the widest."""
        low_moves = not spec.symmetric and bins.lo < 0
        high_moves = spec.symmetric or bins.hi > 0
        low = high = lo = hi = 0.0
        for octaves in _ROUNDS:
            # the grid around the best so far, widest first; an end that must stay has one candidate
            lows = np.unique(np.minimum(low + octaves * low_moves, 0))[::-1]
            highs = np.unique(np.minimum(high + octaves * high_moves, 0))[::-1]
            grid_low, grid_high = (g.ravel() for g in np.meshgrid(lows, highs))
            los, his = _ranges(bins, spec, grid_low, grid_high)
            best = int(np.argmin(expected_error(bins, los, his, spec)))
            low, high, lo, hi = (float(v[best]) for v in (grid_low, grid_high, los, his))
        return lo, hi
