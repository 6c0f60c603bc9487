"""Integers of 2 to 8 bits as bytes: as ONNX packs INT4, UINT4, INT2 and UINT2, and as bit planes.

ONNX has no types of 3, 5, 6 and 7 bits. They are stored as planes of 4, 2 and 1 bits, from which
integer operators that ONNX Runtime folds when it loads the model compute the values:

    value = plane₁ · 2^shift₁ + plane₂ · 2^shift₂ (+ ...)

All planes of a weight lie in one tensor of 4 bits (``nibbles``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.quant.types import Array

# Widths of the planes, highest bits first, by width of the values.
PLANES: dict[int, tuple[int, ...]] = {
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


@dataclass(frozen=True)
class Plane:
    """Some bits of all values: unsigned, uint8, in the values' shape; and what they count for."""

    bits: int
    shift: int
    values: Array


def planes(codes: Array, bits: int) -> list[Plane]:
    """Unsigned codes, uint8 of any shape, as planes, highest bits first.

    Raises ValueError where a code has more than ``bits`` bits, or no planes have that width.
    """
    if bits not in PLANES:
        raise ValueError(f"{bits} bits: expected one of {list(PLANES)}")
    _check_width(codes, bits)
    found, shift = [], bits
    for width in PLANES[bits]:
        shift -= width
        found.append(Plane(width, shift, (codes >> shift) & (2**width - 1)))
    return found


NIBBLE = 4


def plane_spans(bits: int, count: int) -> list[tuple[int, int, int, int]]:
    """(width, shift, start, stop) of each plane of ``count`` codes in what ``nibbles`` returns."""
    spans, start, shift = [], 0, bits
    for width in PLANES[bits]:
        shift -= width
        stop = start + -(-count * width // NIBBLE)
        spans.append((width, shift, start, stop))
        start = stop
    return spans


def nibbles(codes: Array, bits: int) -> Array:
    """Unsigned codes of 2 to 7 bits, uint8 of any shape, as values of 4 bits: uint8, flat.

    Plane after plane. A nibble holds 4, 2 or 1 values of a plane; the first part of the values is
    in the lowest bits, the next one above, and the last one is filled with zeros.
    Raises ValueError where a code has more than ``bits`` bits.
    """
    parts = []
    for plane in planes(codes.reshape(-1), bits):
        apart = NIBBLE // plane.bits
        length = -(-codes.size // apart)
        filled = np.zeros(length * apart, np.uint8)
        filled[: codes.size] = plane.values
        joined = np.zeros(length, np.uint8)
        for i in range(apart):
            joined |= filled[i * length : (i + 1) * length] << (plane.bits * i)
        parts.append(joined)
    flat: Array = np.concatenate(parts)
    return flat


def packed(values: Array, bits: int) -> bytes:
    """Integers of any shape as ONNX ``raw_data``: 8, 4 or 2 bits each, the first in the low bits.

    values: int8 or uint8; signed ones as two's complement. The last byte is filled with zeros.
    Source: onnx.proto, TensorProto.raw_data. Raises ValueError where a value needs more bits.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits: ONNX packs 2, 4 or 8")
    _check_width(values, bits)
    per_byte = 8 // bits
    unsigned = values.reshape(-1).view(np.uint8) & np.uint8(2**bits - 1)
    filled = np.zeros(-(-unsigned.size // per_byte) * per_byte, np.uint8)
    filled[: unsigned.size] = unsigned
    joined = np.zeros(filled.size // per_byte, np.uint8)
    for i in range(per_byte):
        joined |= filled[i::per_byte] << (bits * i)
    return joined.tobytes()


def _check_width(values: Array, bits: int) -> None:
    if values.dtype not in (np.int8, np.uint8):
        raise ValueError(f"expected int8 or uint8, found {values.dtype}")
    low, high = (
        (0, 2**bits - 1) if values.dtype == np.uint8 else (-(1 << bits - 1), (1 << bits - 1) - 1)
    )
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise ValueError(f"values from {values.min()} to {values.max()} need over {bits} bits")
