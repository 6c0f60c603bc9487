"""GPTQ: rounds a weight row by row; later rows compensate for the rounding errors so far."""

from __future__ import annotations

import numpy as np

from qcompile.quant.affine import quantize
from qcompile.quant.types import Array, QSpec
from qcompile.quant.weight_rounding import PAIR_SUM, Rounded, weight_params


def compensated(values: Array, gram: Array, spec: QSpec, damping: float) -> Rounded:
    """Round row by row; later rows compensate for the errors of earlier ones.

    values: (inputs, outputs), symmetric per-output scales. gram: (inputs, inputs), the second
    moments of the data. Minimizes ``|X W - X Wq|`` greedily with the inverse of the damped Gram
    matrix, rows with most energy first (GPTQ, Frantar et al. 2022, algorithm 1). ``damping`` is in
    units of the mean of the diagonal: at 1 the data weighs as much as the assumption that all
    channels are equal and uncorrelated, which helps on text unlike the calibration data. With a
    ``paired`` spec the later row of each pair is clipped, which later rows compensate too.

    Without per-output scales, or with moments of zero, the result is ``nearest``.
    """
    params = weight_params(values, spec)
    if params.scale.ndim == 0 or spec.axis not in (1, -1):
        return Rounded(quantize(values, params), params)
    order = np.argsort(-np.diagonal(gram), kind="stable")
    # Float32 moments err by about 2^-24 of their largest eigenvalue, which is at most ``inputs``
    # times the mean of the diagonal: with less damping they need not be positive definite.
    least_damping = len(gram) * 2.0**-22
    level = max(damping, least_damping) * float(np.mean(np.diagonal(gram), dtype=np.float64))
    if level <= 0:
        return Rounded(quantize(values, params), params)
    # In units of the level the smallest eigenvalue is 1: float32 is enough, and twice as fast.
    damped = (gram.take(order, 0).take(order, 1) / level).astype(np.float32)
    damped[np.diag_indices_from(damped)] += 1
    # Upper U with Uᵀ U = D⁻¹: U = R⁻¹ for D = R Rᵀ with R upper, the Cholesky factor of D with rows
    # and columns reversed.
    factor = np.ascontiguousarray(_inverse_factor(damped[::-1, ::-1])[::-1, ::-1])
    partners = _partners(order) if spec.paired else None
    rows = _carry_errors(values[order].astype(np.float32), factor, params.scale, spec, partners)
    result = np.empty_like(rows)
    result[order] = rows
    return Rounded(result, params)


def _inverse_factor(matrix: Array, base: int = 128) -> Array:
    """Inverse of the lower L with L Lᵀ = matrix, (n, n), by recursion on halves.

    Nearly all of it is matrix multiplication, several times as fast as LAPACK's factorization and
    inversion.
    """
    size = len(matrix)
    if size <= base:
        inverse: Array = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return inverse
    half = size // 2
    first = _inverse_factor(matrix[:half, :half], base)
    below = matrix[half:, :half] @ first.T  # lower left block of L
    # The Schur complement gives the lower right block.
    last = _inverse_factor(matrix[half:, half:] - below @ below.T, base)
    result = np.zeros_like(matrix)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -(last @ below) @ first
    return result


def _partners(order: Array) -> Array:
    """Position in ``order`` of each row's pair partner if rounded earlier, else -1; (inputs,)."""
    position = np.empty(len(order) + 1, np.int64)
    position[order] = np.arange(len(order))
    position[len(order)] = len(order)  # an odd last row has no partner: as if it came last
    other = position[np.minimum(order ^ 1, len(order))]
    partners: Array = np.where(other < np.arange(len(order)), other, -1)
    return partners


def _carry_errors(
    rows: Array,
    factor: Array,
    scale: Array,
    spec: QSpec,
    partners: Array | None = None,
    block: int = 64,
) -> Array:
    """GPTQ's inner loop in blocks: ``rows``, overwritten, as integers (inputs, outputs)."""
    quantized = np.empty(rows.shape, spec.dtype)
    for start in range(0, len(rows), block):
        stop = min(start + block, len(rows))
        errors = np.empty((stop - start, rows.shape[1]), np.float32)
        for i in range(start, stop):
            # Subtract the errors of the rows of this block; earlier blocks are subtracted already.
            row = rows[i] - factor[start:i, i] @ errors[: i - start]
            steps = np.rint(row / scale)
            low, high = _limits(spec, quantized, -1 if partners is None else partners[i])
            np.minimum(np.maximum(steps, low, out=steps), high, out=steps)
            quantized[i] = steps
            errors[i - start] = (row - steps * scale) / factor[i, i]
        rows[stop:] -= factor[start:stop, stop:].T @ errors
    return quantized


def _limits(spec: QSpec, quantized: Array, partner: int) -> tuple[Array | int, Array | int]:
    """Smallest and largest integer of a row, given its partner where that is rounded already."""
    low, high = spec.limits
    if partner < 0:
        return low, high
    other = quantized[partner].astype(np.float32)
    return (
        np.maximum(low, -PAIR_SUM - np.minimum(other, 0)),
        np.minimum(high, PAIR_SUM - np.maximum(other, 0)),
    )
