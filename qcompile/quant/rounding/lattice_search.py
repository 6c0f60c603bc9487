"""Codes of least error of a layer's outputs, by descent from a first rounding.

The error ``|X (W - Wq)|²`` is a quadratic form of the weight's error with the second moments
H = XᵀX, separate for each output. One input after another takes the best code given all others, so
the error never rises (coordinate descent on the lattice: QuantEase, Behdin et al. 2023, algorithm
1). AdaRound (Nagel et al. 2020, equation 21) minimizes the same form by gradients over soft
roundings; here codes may move by several steps.
"""

from __future__ import annotations

import numpy as np

from qcompile.quant.rounding.lattice import Lattice
from qcompile.quant.types import Array, Floats

_SWEEPS = 8
_ROWS = 64  # rows per step: between steps, all that follows is matrix multiplication
_SETTLED = 1e-4  # share of codes that a sweep must change for another one


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
    steps = codes.astype(np.float32) - lattice.middle
    for _ in range(sweeps):
        changed = _sweep(target, moments, lattice, steps)
        if changed <= _SETTLED * steps.size:
            break
    return (steps + lattice.middle).astype(np.uint8)


def _sweep(target: Floats, moments: Floats, lattice: Lattice, steps: Floats) -> int:
    """One pass over the rows of ``steps``, which it changes: how many changed."""
    scale, low, high = lattice.by_row(), -lattice.middle, lattice.largest_code - lattice.middle
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
            new = np.clip(steps[row] + distance, low, high)
            moved[i] = (new - steps[row]) * scale[row]
            changed += int(np.count_nonzero(new != steps[row]))
            steps[row] = new
        gradient += moments[:, rows] @ moved
    return changed
