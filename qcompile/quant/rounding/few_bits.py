"""Weights of 2 to 7 bits as int8 values with one scale per output channel.

A value is a code times an integer that the values of a block share (``block_multipliers``): up to 7
with blocks, 1 without, and negative where that end of the codes reaches farther. So kernels, and
passes that look at integers, see an ordinary int8 weight. All its values have at most 7 bits, so
that sums of two products with uint8 data fit into int16. The file holds the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.quant.rounding.adaround import adarounded
from qcompile.quant.rounding.block_multipliers import BlockMultipliers, rebased, with_multipliers
from qcompile.quant.rounding.gptq import compensated_codes, damped
from qcompile.quant.rounding.lattice import fitted
from qcompile.quant.rounding.lattice_search import descended
from qcompile.quant.types import Array, QParams, QSpec
from qcompile.quant.weight_rounding import Rounded

# So that multipliers of both signs are stored in INT4.
_MOST_MULTIPLIER = 7
_ROUNDS = 2


@dataclass(frozen=True)
class RoundingProblem:
    """What to round: float32 ``weight`` (inputs, outputs) to few bits as ``spec``.

    moments: (inputs, inputs), second moments of the layer's data, None to treat all inputs as
    equally large and uncorrelated. damping: in units of the mean of their diagonal. row_factors:
    uint8 (inputs,), by which the data was divided, None for ones; ``weight`` is not multiplied by
    them, and the moments are those of the data before the division. soft: soft roundings are
    learned (``adaround``) before the descent; that takes some twenty times as long.
    """

    weight: Array
    spec: QSpec
    moments: Array | None = None
    damping: float = 0.1
    row_factors: Array | None = None
    soft: bool = False


def few_bits_nearest(values: Array, spec: QSpec) -> Rounded:
    """Each value rounded to its nearest, with the scales of least squared error.

    values: a matrix, or a constant of more axes whose channels are along ``spec.axis``. Raises
    ValueError where it is empty or holds NaN or infinity.
    """
    assert spec.axis is not None  # QSpec refuses few bits without it
    outputs_last = np.moveaxis(values, spec.axis, -1)
    matrix = outputs_last.reshape(-1, outputs_last.shape[-1])
    found = few_bits_rounded(RoundingProblem(matrix, spec))
    integers, steps = (
        np.ascontiguousarray(np.moveaxis(part.reshape(outputs_last.shape), -1, spec.axis))
        for part in (found.values, found.steps)
        if part is not None
    )
    return Rounded(integers, found.params, steps)


def few_bits_rounded(problem: RoundingProblem) -> Rounded:
    """Integers (inputs, outputs) of small output error: compensation, then descent on codes and
    scales in turn (``lattice_search``); without moments, to nearest.

    The integers include the row factors: they are what is multiplied by the divided data. Raises
    ValueError where the weight is empty or holds NaN or infinity.
    """
    weight, spec = np.asarray(problem.weight, np.float32), problem.spec
    assert spec.width is not None
    grid = fitted_grid(weight, spec.width, spec.block, problem.row_factors)
    moments = None if problem.moments is None else damped(problem.moments, problem.damping)
    if problem.moments is None or moments is None:
        codes = grid.lattice.nearest(weight)
        return _rounded(rebased(weight, None, grid, codes), codes, spec)
    codes = compensated_codes(weight, problem.moments, grid.lattice, problem.damping)
    if problem.soft:
        codes = adarounded(weight, moments, grid.lattice, codes)
    return _rounded(*alternated(weight, moments, grid, codes), spec)


def fitted_grid(
    weight: Array, bits: int, block: int | None, row_factors: Array | None = None
) -> BlockMultipliers:
    """The values that ``weight`` (inputs, outputs) may take, with scales for rounding to nearest.

    block: inputs per multiplier, None for one scale per output. Raises ValueError where the weight
    is empty or holds NaN or infinity.
    """
    lattice = fitted(weight, bits, block=block)
    most = 1 if block is None else _MOST_MULTIPLIER
    return with_multipliers(weight, lattice, most, row_factors=row_factors)


def alternated(
    weight: Array, moments: Array, grid: BlockMultipliers, codes: Array
) -> tuple[BlockMultipliers, Array]:
    """Grid and codes after descent on codes, then on scales, in turn; neither raises the error.

    weight, codes: (inputs, outputs). moments: (inputs, inputs), damped.
    """
    for _ in range(_ROUNDS):
        codes = descended(weight, moments, grid.lattice, codes)
        grid = rebased(weight, moments, grid, codes)
    return grid, descended(weight, moments, grid.lattice, codes)


def _rounded(grid: BlockMultipliers, codes: Array, spec: QSpec) -> Rounded:
    zero = np.zeros(grid.base.shape, np.int8)
    return Rounded(grid.integers(codes), QParams(grid.base, zero, spec), grid.steps())
