"""Weights in blocks with a scale each, as MatMulNBits and GatherBlockQuantized store them.

    value = (code - 2^(bits - 1)) · scale of its block

Codes run along the inputs of each output channel (the channels of each row of a table), the first
in the lowest bits of a byte. A weight whose int8 values need few bits keeps exactly these values:
its multipliers go into the scales. Sources: ONNX Runtime, contrib_ops/cpu/quantization:
matmul_nbits.cc, gather_block_quantized.cc.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from qcompile.ir import Refusal
from qcompile.quant import Array, StoredCodes, packed, stored_codes

_BYTE = 8
# Bits of a code -> the smallest and the largest block that an operator takes, powers of two.
Blocks: TypeAlias = Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class BlockRows:
    """A matrix with a scale per block, one row for each output channel, or each row of a table.

    codes: uint8 (rows, inputs). scales: float (rows, blocks). refusal: why codes have more bits in
    the file than the weight needs, None where they do not.
    """

    codes: Array
    scales: Array
    bits: int
    block: int
    refusal: Refusal | None = None

    @property
    def packed(self) -> Array:
        """The codes as bytes, uint8 (rows, blocks, block · bits / 8).

        The last block is filled with codes that stand for zero.
        """
        rows, inputs = self.codes.shape
        count = self.scales.shape[1]
        filled = np.full((rows, count * self.block), 1 << (self.bits - 1), np.uint8)
        filled[:, :inputs] = self.codes
        stored = np.frombuffer(packed(filled, self.bits), np.uint8)
        return stored.reshape(rows, count, self.block * self.bits // _BYTE)


def block_rows(values: Array, scale: Array, blocks: Blocks) -> BlockRows:
    """An int8 weight in the fewest bits that hold all its values.

    values: int8 (rows, inputs). scale: float (rows,). blocks: what the operator takes, 8 bits among
    them.
    """
    inputs = values.shape[1]
    stored = stored_codes(np.ascontiguousarray(values.T))
    if stored is None:
        return _in_bytes(values, scale, blocks)
    stored = _without_factors(stored)
    for bits in sorted(b for b in blocks if stored.bits <= b < _BYTE):
        block = _fitting(blocks[bits], stored.block, inputs)
        if block is not None:
            return _in_codes(stored, scale, bits, block, _why_wider(stored, bits, blocks))
    return _in_bytes(values, scale, blocks, _why_wider(stored, _BYTE, blocks))


def _without_factors(stored: StoredCodes) -> StoredCodes:
    """The same with the factors of single inputs in the codes, which then may have more bits."""
    if stored.row_factors is None:
        return stored
    signed = (stored.codes.astype(np.int16) - (1 << stored.bits - 1)) * stored.row_factors[:, None]
    bits = 1 + int(max(signed.max(), -signed.min() - 1)).bit_length()
    codes = (signed + (1 << bits - 1)).astype(np.uint8)
    return replace(stored, codes=codes, bits=bits, row_factors=None)


def fitting_block(least: int, largest: int, inputs: int) -> int:
    """The least power of two that holds a whole row, between the two bounds."""
    return min(largest, max(least, 1 << (inputs - 1).bit_length()))


def _fitting(bounds: tuple[int, int], stored: int | None, inputs: int) -> int | None:
    """The block to write codes in that share a multiplier in blocks of ``stored``, None for none.

    A block of the operator must lie in one of these.
    """
    least, largest = bounds
    if stored is None or stored >= inputs:
        return fitting_block(least, largest, inputs)
    block = min(stored & -stored, largest)  # the largest power of two that divides it
    return block if block >= least else None


def _in_codes(
    stored: StoredCodes, scale: Array, bits: int, block: int, refusal: Refusal | None
) -> BlockRows:
    inputs = len(stored.codes)
    count = -(-inputs // block)
    wider = stored.codes.T + np.uint8((1 << (bits - 1)) - (1 << (stored.bits - 1)))
    scales = np.repeat(scale[:, None], count, axis=1)
    if stored.multipliers is not None:
        of = np.arange(count) * block // (stored.block or inputs)
        scales = scales * stored.multipliers[of].T.astype(scale.dtype)
    return BlockRows(wider, scales, bits, block, refusal)


def _in_bytes(
    values: Array, scale: Array, blocks: Blocks, refusal: Refusal | None = None
) -> BlockRows:
    block = fitting_block(*blocks[_BYTE], values.shape[1])
    scales = np.repeat(scale[:, None], -(-values.shape[1] // block), axis=1)
    return BlockRows(values.view(np.uint8) ^ np.uint8(128), scales, _BYTE, block, refusal)


def _why_wider(stored: StoredCodes, bits: int, blocks: Blocks) -> Refusal | None:
    if stored.bits == bits:
        return None
    apart = stored.block is not None and stored.block < len(stored.codes)
    where = f" in blocks of {stored.block}" if apart else ""
    found = f"the weight's codes have {stored.bits} bits{where}, and are stored in {bits}"
    if stored.bits not in blocks:
        taken = ", ".join(map(str, sorted(blocks)))
        return Refusal(f"{found}: the operator takes {taken}")
    least, largest = blocks[stored.bits]
    return Refusal(f"{found}: the operator takes blocks of a power of two, {least} to {largest}")
