"""How a weight becomes integers: to nearest, or as a pass has chosen for it.

One place for both, because a shift that is folded into a bias must be multiplied by the weight as
it will be quantized: with the float weight the error ``shift · (W - Wq·s)`` is the same for every
token and adds up.
"""

from __future__ import annotations

import numpy as np

from qcompile.plan import Rounded
from qcompile.qtypes import Array, QSpec, dequantize, qparams, quantize, weight_range


def nearest(values: Array, spec: QSpec) -> Rounded:
    """Round each value to the nearest step; ranges are the weight's own extrema.

    Raises ValueError where the weight is empty or holds NaN or infinity.
    """
    params = qparams(weight_range(values, spec), spec)
    return Rounded(quantize(values, params), params)


def real(rounded: Rounded) -> Array:
    """The float values that the integers stand for, float32."""
    return dequantize(rounded.values, rounded.params)


def compensated(values: Array, gram: Array, spec: QSpec, damping: float) -> Rounded:
    """Round row by row, letting the rows to come make up for the error of those before.

    values: (inputs, outputs), symmetric per-output scales. gram: (inputs, inputs), the second
    moments of the data. Minimizes ``|X W - X Wq|`` greedily with the inverse of the damped Gram
    matrix, rows with most energy first (GPTQ, Frantar et al. 2022, algorithm 1). ``damping`` is in
    units of the mean of the diagonal: 1 trusts the data as much as the assumption that all
    channels are alike, which text unlike the calibration data needs.
    """
    params = qparams(weight_range(values, spec), spec)
    if params.scale.ndim == 0 or spec.axis not in (1, -1):
        return Rounded(quantize(values, params), params)
    order = np.argsort(-np.diagonal(gram), kind="stable")
    # Float32 moments err by about 2^-24 of their largest eigenvalue, which is at most ``inputs``
    # times the mean of the diagonal: with less damping they need not be positive definite.
    least = len(gram) * 2.0**-22
    level = max(damping, least) * float(np.mean(np.diagonal(gram), dtype=np.float64))
    if level <= 0:
        return Rounded(quantize(values, params), params)
    # In units of the level the smallest eigenvalue is 1: float32 is enough, and twice as fast.
    damped = (gram.take(order, 0).take(order, 1) / level).astype(np.float32)
    damped[np.diag_indices_from(damped)] += 1
    # The upper U with Uᵀ U = D⁻¹ is R⁻¹ of D = R Rᵀ, and R is Cholesky's factor from the other end.
    factor = np.ascontiguousarray(_inverse_factor(damped[::-1, ::-1])[::-1, ::-1])
    rows = _carry_errors(values[order].astype(np.float32), factor, params.scale, spec)
    result = np.empty_like(rows)
    result[order] = rows
    return Rounded(result, params)


def _inverse_factor(matrix: Array, base: int = 128) -> Array:
    """Inverse of the lower L with L Lᵀ = matrix, by halves: nearly all of it products of matrices,
    which are several times as fast as LAPACK's factorization and inversion one after the other.
    """
    size = len(matrix)
    if size <= base:
        inverse: Array = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return inverse
    half = size // 2
    first = _inverse_factor(matrix[:half, :half], base)
    below = matrix[half:, :half] @ first.T
    last = _inverse_factor(matrix[half:, half:] - below @ below.T, base)
    result = np.zeros_like(matrix)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -(last @ below) @ first
    return result


def _carry_errors(rows: Array, factor: Array, scale: Array, spec: QSpec, block: int = 64) -> Array:
    """GPTQ's inner loop in blocks: integers (inputs, outputs) of ``rows``, which is overwritten."""
    low, high = spec.limits
    found = np.empty(rows.shape, spec.dtype)
    for start in range(0, len(rows), block):
        stop = min(start + block, len(rows))
        errors = np.empty((stop - start, rows.shape[1]), np.float32)
        for i in range(start, stop):
            row = rows[i] - factor[start:i, i] @ errors[: i - start]
            steps = np.rint(row / scale)
            np.minimum(np.maximum(steps, low, out=steps), high, out=steps)
            found[i] = steps
            errors[i - start] = (row - steps * scale) / factor[i, i]
        rows[stop:] -= factor[start:stop, stop:].T @ errors
    return found
