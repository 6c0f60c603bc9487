"""Block scales for an integer kernel: one float per output, times a small integer per block.

    weight ≈ ((code - middle) · multiplier) · base

The term in brackets is an int8 value that ONNX Runtime computes once, when it loads the model
(Cast, Gather and Mul of constants are folded), so the matrix multiplication is the ordinary one
with one scale per output. This is the low power blockwise quantization (LPBQ) of AIMET. Where all
values are within ``SEVEN_BITS``, sums of two terms with uint8 data fit into int16:
255 · 64 · 2 < 2¹⁵.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qcompile.quant.rounding.lattice import Lattice
from qcompile.quant.types import Array, Floats

SEVEN_BITS = 64  # largest magnitude
# Shares of the largest scale that are tried as the one with the largest multiplier.
_SHARES = np.linspace(0.55, 1.15, 13)


@dataclass(frozen=True)
class BlockMultipliers:
    """Scales as float32 base (outputs,) times int8 multipliers (blocks, outputs), not zero.

    ``lattice`` has these scales. ``row_factors``: uint8 (inputs,), by which the data of each input
    was divided before it was quantized, so the kernel's weight is multiplied by them.
    """

    base: Floats
    multipliers: Array
    row_factors: Array
    lattice: Lattice

    def integers(self, codes: Array) -> Array:
        """What the kernel multiplies, int8 (inputs, outputs), for uint8 codes of that shape."""
        centred = codes.astype(np.int16) - self.lattice.middle
        integers: Array = (centred * self.steps()).astype(np.int8)
        return integers

    def steps(self) -> Array:
        """What the code of each value is multiplied by, int8 (inputs, outputs)."""
        times = np.repeat(self.multipliers, self.lattice.block, axis=0)[: self.lattice.inputs]
        steps: Array = (times * self.row_factors[:, None]).astype(np.int8)
        return steps


def with_multipliers(
    values: Array,
    lattice: Lattice,
    most: int,
    *,
    row_factors: Array | None = None,
    largest: int = SEVEN_BITS,
) -> BlockMultipliers:
    """Scales rounded to integer multiples, up to ``most``, of one base per output.

    values: (inputs, outputs); the base is that of least squared error when they are rounded to
    nearest. ``most`` is 7 for multipliers in int4; it is lowered in
    blocks where integers would exceed ``largest``. row_factors: uint8 (inputs,), None for ones:
    with them a channel of large values gets a coarser step of the data and no coarser one of its
    weight, where a scale moved into the weight would widen the range of the whole block. Raises
    ValueError where even multipliers of 1 would exceed ``largest``.
    """
    factors = np.ones(lattice.inputs, np.uint8) if row_factors is None else row_factors
    # Largest multiplier of each block, (blocks, 1).
    limits = np.minimum(most, largest // (lattice.middle * _block_maxima(factors, lattice.block)))
    if limits.min() < 1:
        raise ValueError(f"codes of {lattice.bits} bits exceed {largest} without multipliers")
    sizes, sign = np.abs(lattice.scale), np.sign(lattice.scale)
    base = (sizes / limits).max(axis=0).astype(np.float32)
    least, best = np.full(base.shape, np.inf), base
    for share in _SHARES.astype(np.float32):
        tried = base * share
        rounded = replace(lattice, scale=_multiples(sizes, tried, limits) * sign * tried)
        errors = rounded.real(rounded.nearest(values)) - values
        error = np.square(errors, dtype=np.float64).sum(axis=0)
        best = np.where(error < least, tried, best)
        least = np.minimum(error, least)
    multipliers = _multiples(sizes, best, limits) * sign
    scaled = replace(lattice, scale=multipliers * best)
    return BlockMultipliers(best, multipliers.astype(np.int8), factors, scaled)


def rebased(
    values: Array, moments: Array | None, found: BlockMultipliers, codes: Array
) -> BlockMultipliers:
    """The bases of least error of the outputs for fixed codes and multipliers (least squares).

    values, codes: (inputs, outputs). moments: (inputs, inputs), None for the error of the values
    themselves. Bases that would vanish or change their sign stay as they are.
    """
    real = found.lattice.real(codes)
    weighted = real if moments is None else moments.astype(np.float32) @ real
    squares = np.einsum("io,io->o", real, weighted)
    inner = np.einsum("io,io->o", np.asarray(values, np.float32), weighted)
    usable = (squares > 0) & (inner > 0)
    share = np.where(usable, inner / np.where(usable, squares, 1), 1).astype(np.float32)
    scaled = replace(found.lattice, scale=found.lattice.scale * share)
    return replace(found, base=found.base * share, lattice=scaled)


def _multiples(sizes: Floats, base: Floats, limits: Array) -> Floats:
    """The multiple of the base next to each scale, 1 to the block's limit; (blocks, outputs)."""
    multiples: Floats = np.clip(np.rint(sizes / base), 1, limits).astype(np.float32)
    return multiples


def _block_maxima(factors: Array, block: int) -> Array:
    """Largest factor of each block, (blocks, 1)."""
    maxima: Array = np.maximum.reduceat(factors, np.arange(0, len(factors), block))[:, None]
    return maxima.astype(np.float32)
