"""The values that a weight of few bits may take: a scale for each block of inputs.

A weight is a matrix (inputs, outputs); a block is some inputs in a row, of one output. A value is
``(code - middle) * scale`` with an unsigned code of ``bits`` bits and ``middle`` at half of the
codes (the last block may be shorter). One scale per output is one block. The scale is negative
where the larger end of a block is the positive one, since there is one more code below zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.quant.types import Array, Floats

_SMALLEST_SCALE = np.float32(2.0**-126)
# Shares of a block's range that are tried as the range of its codes.
_SHARES = np.linspace(0.3, 1, 40)
_STEP = 1 << 18  # values per step, so that temporaries stay in the cache


@dataclass(frozen=True)
class Lattice:
    """Scales of one weight: float32 (blocks, outputs), for ``inputs`` rows of it; not zero."""

    scale: Floats
    bits: int
    inputs: int
    block: int

    def __post_init__(self) -> None:
        blocks = -(-self.inputs // self.block) if self.block > 0 else 0
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.bits} bits: a lattice has 2 to 8")
        if self.scale.shape[:1] != (blocks,):
            raise ValueError(
                f"scales {self.scale.shape} do not fit {self.inputs} inputs in blocks of "
                f"{self.block}"
            )

    @property
    def largest_code(self) -> int:
        largest: int = 2**self.bits - 1
        return largest

    @property
    def middle(self) -> int:
        """The code of zero."""
        middle: int = 2 ** (self.bits - 1)
        return middle

    def by_row(self) -> Floats:
        """Scale of each value, (inputs, outputs)."""
        repeated: Floats = np.repeat(self.scale, self.block, axis=0)[: self.inputs]
        return repeated

    def nearest(self, values: Array) -> Array:
        """The code next to each value, uint8 (inputs, outputs)."""
        codes = np.rint(values / self.by_row()) + self.middle
        nearest: Array = np.clip(codes, 0, self.largest_code).astype(np.uint8)
        return nearest

    def real(self, codes: Array) -> Floats:
        """The float32 values of codes, both (inputs, outputs)."""
        values: Floats = (codes.astype(np.float32) - self.middle) * self.by_row()
        return values


def fitted(values: Array, bits: int, *, block: int | None = None) -> Lattice:
    """The scales of least squared error when values are rounded to nearest.

    values: (inputs, outputs). block: inputs per scale, None for one scale per output. For
    each block 40 shares of its range are tried: at few bits it pays to clip the largest values.
    A table (tokens, channels) is fitted as its transpose, tokens being the outputs. Raises
    ValueError where values are no matrix, empty or not finite.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"expected a matrix with values, found shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("weight holds NaN or infinity")
    inputs, outputs = values.shape
    block = inputs if block is None else min(block, inputs)
    width = max(1, _STEP // block)
    scale = np.empty((-(-inputs // block), outputs), np.float32)
    for number, start in enumerate(range(0, inputs, block)):
        for left in range(0, outputs, width):
            piece = values[start : start + block, left : left + width]
            scale[number, left : left + width] = _fitted_block(piece, bits)
    return Lattice(scale, bits, inputs, block)


def _fitted_block(values: Array, bits: int) -> Floats:
    """Scale of one block, (1, outputs): the best share of its range."""
    block = np.asarray(values, np.float32)
    whole = _of_range(block, bits)
    least, scale = np.full(block.shape[1], np.inf), whole
    for share in _SHARES[::-1].astype(np.float32):
        tried = Lattice(_normal(whole * share), bits, len(block), len(block))
        error = np.square(tried.real(tried.nearest(block)) - block, dtype=np.float64).sum(axis=0)
        scale = np.where(error < least, tried.scale, scale)
        least = np.minimum(error, least)
    return scale


def _of_range(block: Floats, bits: int) -> Floats:
    """Scale that covers a block's range, (1, outputs)."""
    lowest = np.minimum(block.min(axis=0, keepdims=True), 0)
    highest = np.maximum(block.max(axis=0, keepdims=True), 0)
    # Codes reach half + ½ steps on one side, rounding included, and half - ½ on the other.
    scale = np.maximum(-lowest, highest) / np.float32(2 ** (bits - 1) - 0.5)
    scale = np.where(highest > -lowest, -scale, scale)
    return _normal(scale)


def _normal(scale: Floats) -> Floats:
    """Scales without denormal ones: there all values count as zeros, and any scale is exact."""
    return np.where(np.abs(scale) < _SMALLEST_SCALE, 1, scale).astype(np.float32)
