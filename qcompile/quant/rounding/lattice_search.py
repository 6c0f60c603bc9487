"""Codes and scales of least error of a layer's outputs, by descent from a first rounding.

The error ``|X (W - Wq)|²`` is a quadratic form of the weight's error with the second moments
H = XᵀX, separate for each output. Both steps minimize it exactly over one part of the unknowns, so
neither ever raises it:

- codes: one input after another takes the best code given all others (coordinate descent on the
  lattice: QuantEase, Behdin et al. 2023, algorithm 1). AdaRound (Nagel et al. 2020, equation 21)
  minimizes the same form by gradients over soft roundings; here codes may move by several steps.
- scales: for fixed codes the form is quadratic in the scales (least squares).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcompile.quant.rounding.gptq import compensated_codes, damped
from qcompile.quant.rounding.lattice import Lattice
from qcompile.quant.types import Array, Floats

_SWEEPS = 8
_ROWS = 64  # rows per step: between steps, all that follows is matrix multiplication
_SETTLED = 1e-4  # share of codes that a sweep must change for another one


def searched(
    values: Array, gram: Array, lattice: Lattice, damping: float, rounds: int = 2
) -> tuple[Lattice, Array]:
    """Lattice and codes after compensation and ``rounds`` of descent on codes, then on scales.

    values: (inputs, outputs). gram: (inputs, inputs), the second moments of the data, undamped.
    Zeros do not change. Moments of zero: the lattice as it is, and the nearest codes.
    """
    codes = compensated_codes(values, gram, lattice, damping)
    moments = damped(gram, damping)
    if moments is None:
        return lattice, codes
    for _ in range(rounds):
        codes = descended(values, moments, lattice, codes)
        lattice = refitted(values, moments, lattice, codes)
    return lattice, descended(values, moments, lattice, codes)


def output_error(values: Array, moments: Array, real: Array) -> Array:
    """Squared error of each output summed over the data, (outputs,).

    values and real: (inputs, outputs), the weight and its rounded values; moments: (inputs,
    inputs).
    """
    error = real - np.asarray(values, np.float32)
    squared: Array = np.einsum("io,io->o", error, moments @ error, dtype=np.float64)
    return squared


def descended(
    values: Array, moments: Array, lattice: Lattice, codes: Array, sweeps: int = _SWEEPS
) -> Array:
    """Codes, uint8 (inputs, outputs), from which no single change lowers the error.

    values: (inputs, outputs). moments: (inputs, inputs), positive diagonal, so damped. Stops after
    ``sweeps`` over all inputs, or where a sweep changes hardly anything. Ties keep the code.
    """
    target, moments = np.asarray(values, np.float32), np.asarray(moments, np.float32)
    scale, zero = lattice.by_row()
    steps = codes.astype(np.float32) - zero
    for _ in range(sweeps):
        changed = _sweep(target, moments, scale, (-zero, lattice.largest_code - zero), steps)
        if changed <= _SETTLED * steps.size:
            break
    return (steps + zero).astype(np.uint8)


def _sweep(
    target: Floats, moments: Floats, scale: Floats, limits: tuple[Floats, Floats], steps: Floats
) -> int:
    """One pass over the rows of ``steps``, which it changes: how many changed."""
    low, high = limits
    gradient = moments @ (steps * scale - target)
    changed = 0
    for start in range(0, len(steps), _ROWS):
        rows = slice(start, start + _ROWS)
        within = moments[rows, rows]
        moved = np.zeros_like(gradient[rows])
        for i in range(len(moved)):
            row = start + i
            slope = gradient[row] + within[i] @ moved
            # The minimum of a parabola; rounding the distance from the code keeps codes at rest.
            distance = np.rint(-slope / (within[i, i] * scale[row]))
            new = np.clip(steps[row] + distance, low[row], high[row])
            moved[i] = (new - steps[row]) * scale[row]
            changed += int(np.count_nonzero(new != steps[row]))
            steps[row] = new
        gradient += moments[:, rows] @ moved
    return changed


def refitted(values: Array, moments: Array, lattice: Lattice, codes: Array) -> Lattice:
    """The lattice with the scales of least error for these codes, one block after another.

    values, codes: (inputs, outputs). moments: (inputs, inputs). A scale that would vanish or change
    its sign stays as it is, as does that of codes which are all zero.
    """
    moments = np.asarray(moments, np.float32)
    steps = codes.astype(np.float32) - lattice.by_row()[1]
    error = lattice.real(codes) - np.asarray(values, np.float32)
    scales = lattice.scale.copy()
    for block in range(len(scales)):
        rows = slice(block * lattice.block, (block + 1) * lattice.block)
        own = steps[rows]
        slope = np.einsum("io,io->o", own, moments[rows] @ error)
        curvature = np.einsum("io,io->o", own, moments[rows, rows] @ own)
        change = -slope / np.where(curvature > 0, curvature, 1)
        usable = (curvature > 0) & ((scales[block] + change) * scales[block] > 0)
        change = np.where(usable, change, 0).astype(np.float32)
        scales[block] += change
        error[rows] += own * change
    return replace(lattice, scale=scales)
