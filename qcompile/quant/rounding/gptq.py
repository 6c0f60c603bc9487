"""GPTQ: rounds a weight row by row; later rows compensate for the rounding errors so far."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompile.quant.affine import quantize
from qcompile.quant.rounding.lattice import Lattice
from qcompile.quant.types import Array, Floats, QSpec
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
    scaled = damped(gram, damping)
    if scaled is None:
        return Rounded(quantize(values, params), params)
    order, factor = _ordered_factor(gram, scaled)
    partners = _partners(order) if spec.paired else np.full(len(order), -1)
    quantized = np.empty(values.shape, spec.dtype)

    def rounded(position: int, row: Array) -> Array:
        steps = np.rint(row / params.scale)
        low, high = _limits(spec, quantized, partners[position])
        np.minimum(np.maximum(steps, low, out=steps), high, out=steps)
        quantized[position] = steps
        real: Array = steps * params.scale
        return real

    _carry_errors(values[order].astype(np.float32), factor, rounded)
    result = np.empty_like(quantized)
    result[order] = quantized
    return Rounded(result, params)


def compensated_codes(values: Array, gram: Array, lattice: Lattice, damping: float) -> Array:
    """``compensated`` on a lattice, so also with blocks: codes, uint8 (inputs, outputs).

    The scales are not changed: unlike in Frantar et al. they do not follow the carried errors, so
    the order of the rows does not depend on the blocks. Moments of zero: nearest.
    """
    scaled = damped(gram, damping)
    if scaled is None:
        return lattice.nearest(values)
    order, factor = _ordered_factor(gram, scaled)
    scale = lattice.by_row()[order]
    codes = np.empty(values.shape, np.uint8)

    def rounded(position: int, row: Array) -> Array:
        code = np.rint(row / scale[position]) + lattice.middle
        np.clip(code, 0, lattice.largest_code, out=code)
        codes[order[position]] = code
        real: Array = (code - lattice.middle) * scale[position]
        return real

    _carry_errors(values[order].astype(np.float32), factor, rounded)
    return codes


def damped(gram: Array, damping: float) -> Floats | None:
    """Second moments with ``damping`` times their mean diagonal added, in units of what is added.

    float32 (inputs, inputs); None where all moments are zero. In these units the smallest
    eigenvalue is at least 1: float32 is enough, and twice as fast.
    """
    # Float32 moments err by about 2^-24 of their largest eigenvalue, which is at most ``inputs``
    # times the mean of the diagonal: with less damping they need not be positive definite.
    least_damping = len(gram) * 2.0**-22
    level = max(damping, least_damping) * float(np.mean(np.diagonal(gram), dtype=np.float64))
    if level <= 0:
        return None
    scaled: Floats = (gram / level).astype(np.float32)
    scaled[np.diag_indices_from(scaled)] += 1
    return scaled


def _ordered_factor(gram: Array, moments: Floats) -> tuple[Array, Array]:
    """Rows with most energy first, and the upper U with UᵀU = D⁻¹, D damped in that order.

    U = R⁻¹ for D = R Rᵀ with R upper, the Cholesky factor of D with rows and columns reversed.
    """
    order = np.argsort(-np.diagonal(gram), kind="stable")
    ordered = moments.take(order, 0).take(order, 1)
    return order, np.ascontiguousarray(_inverse_factor(ordered[::-1, ::-1])[::-1, ::-1])


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
    rows: Array, factor: Array, rounded: Callable[[int, Array], Array], block: int = 64
) -> None:
    """GPTQ's loop in blocks over ``rows`` (inputs, outputs), which are overwritten.

    ``rounded`` gets the position of a row and its values, corrected by the errors so far, and
    returns the values that they were rounded to.
    """
    for start in range(0, len(rows), block):
        stop = min(start + block, len(rows))
        errors = np.empty((stop - start, rows.shape[1]), np.float32)
        for i in range(start, stop):
            # Subtract the errors of the rows of this block; earlier blocks are subtracted already.
            row = rows[i] - factor[start:i, i] @ errors[: i - start]
            errors[i - start] = (row - rounded(i, row)) / factor[i, i]
        rows[stop:] -= factor[start:stop, stop:].T @ errors


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
