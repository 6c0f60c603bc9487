"""The values that a weight of few bits may take: a scale and a zero for each block of inputs.

A weight is a matrix (inputs, outputs); a block is some inputs in a row, of one output. A value is
``(code - zero) * scale`` with an unsigned code of ``bits`` bits, as in ONNX DequantizeLinear with
``block_size`` on axis 0 (the last block may be shorter). One scale per output is one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qcompile.quant.types import Array, Floats

# Where zero may lie between the codes. "middle": at half of the codes, so nothing is stored, and
# the scale is negative where the larger end of a block is the positive one. "integer": at a code.
# "half": at a code or halfway between two, so that codes may lie at ±½, ±1½ steps.
Zero = Literal["middle", "integer", "half"]
_SMALLEST_SCALE = np.float32(2.0**-126)
# Shares of a block's range that are tried as the range of its codes.
_SHARES = np.linspace(0.3, 1, 40)
_STEP = 1 << 18  # values per step, so that temporaries stay in the cache


@dataclass(frozen=True)
class Lattice:
    """Scales and zeros of one weight: float32 (blocks, outputs), for ``inputs`` rows of it.

    Scales are not zero and may be negative; zeros are multiples of ½ from 0 to the largest code.
    """

    scale: Floats
    zero: Floats
    bits: int
    inputs: int
    block: int

    def __post_init__(self) -> None:
        blocks = -(-self.inputs // self.block) if self.block > 0 else 0
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.bits} bits: a lattice has 2 to 8")
        if self.scale.shape != self.zero.shape or self.scale.shape[:1] != (blocks,):
            raise ValueError(
                f"scales {self.scale.shape} and zeros {self.zero.shape} do not fit "
                f"{self.inputs} inputs in blocks of {self.block}"
            )

    @property
    def largest_code(self) -> int:
        largest: int = 2**self.bits - 1
        return largest

    def by_row(self) -> tuple[Floats, Floats]:
        """Scale and zero of each value, (inputs, outputs) each."""
        return self._spread(self.scale), self._spread(self.zero)

    def _spread(self, per_block: Floats) -> Floats:
        repeated: Floats = np.repeat(per_block, self.block, axis=0)[: self.inputs]
        return repeated

    def nearest(self, values: Array) -> Array:
        """The code next to each value, uint8 (inputs, outputs)."""
        scale, zero = self.by_row()
        return np.clip(np.rint(values / scale + zero), 0, self.largest_code).astype(np.uint8)

    def real(self, codes: Array) -> Floats:
        """The float32 values of codes, both (inputs, outputs)."""
        scale, zero = self.by_row()
        values: Floats = (codes.astype(np.float32) - zero) * scale
        return values


def fitted(
    values: Array,
    bits: int,
    *,
    block: int | None = None,
    zero: Zero = "middle",
    energy: Array | None = None,
) -> Lattice:
    """The scales and zeros of least squared error when values are rounded to nearest.

    values: (inputs, outputs). block: inputs per scale, None for one scale per output. energy:
    weight of each input's squared error, (inputs,), such as the second moments of the data. For
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
    importance = np.ones(inputs) if energy is None else energy
    width = max(1, _STEP // block)
    scale = np.empty((-(-inputs // block), outputs), np.float32)
    offset = np.empty_like(scale)
    for number, start in enumerate(range(0, inputs, block)):
        rows = slice(start, start + block)
        for left in range(0, outputs, width):
            part = np.s_[number : number + 1, left : left + width]
            piece = values[rows, left : left + width]
            scale[part], offset[part] = _fitted_block(piece, bits, zero, importance[rows])
    return Lattice(scale, offset, bits, inputs, block)


def _fitted_block(values: Array, bits: int, zero: Zero, energy: Array) -> tuple[Floats, Floats]:
    """Scale and zero of one block, (1, outputs) each: the best share of its range."""
    block = np.asarray(values, np.float32)
    scale, offset = _of_range(block, bits, zero, 1.0)
    least = np.full(block.shape[1], np.inf)
    for share in _SHARES[::-1]:
        tried = Lattice(*_of_range(block, bits, zero, share), bits, len(block), len(block))
        error = energy @ np.square(tried.real(tried.nearest(block)) - block, dtype=np.float64)
        better = error < least
        least = np.where(better, error, least)
        scale = np.where(better, tried.scale, scale)
        offset = np.where(better, tried.zero, offset)
    return scale, offset


def _of_range(block: Floats, bits: int, zero: Zero, share: float) -> tuple[Floats, Floats]:
    """Scale and zero that cover a share of a block's range, (1, outputs) each."""
    lowest = np.minimum(block.min(axis=0, keepdims=True), 0) * np.float32(share)
    highest = np.maximum(block.max(axis=0, keepdims=True), 0) * np.float32(share)
    largest_code = 2**bits - 1
    if zero == "middle":
        half = 2 ** (bits - 1)
        # Codes reach half + ½ steps on one side, rounding included, and half - ½ on the other.
        scale = np.maximum(-lowest, highest) / np.float32(half - 0.5)
        scale = np.where(highest > -lowest, -scale, scale)
        offset = np.full(scale.shape, half, np.float32)
    else:
        scale = (highest - lowest) / np.float32(largest_code)
        steps = 1 if zero == "integer" else 2
        safe = np.where(np.abs(scale) < _SMALLEST_SCALE, 1, scale)
        offset = np.clip(np.rint(-lowest / safe * steps) / steps, 0, largest_code)
    scale = np.where(np.abs(scale) < _SMALLEST_SCALE, 1, scale)  # all zeros: any scale is exact
    return scale.astype(np.float32), offset.astype(np.float32)
