"""Integers of 2 to 8 bits as bytes: as ONNX packs INT4, UINT4, INT2 and UINT2, and as bit planes.

ONNX has no types of 3, 5, 6 and 7 bits. They are stored as planes of 4, 2 and 1 bits, from which
integer operators that ONNX Runtime folds when it loads the model compute the values:

    value = plane₁ · 2^shift₁ + plane₂ · 2^shift₂ (+ ...)

A plane of one bit lies in the two halves of a plane of two bits, half as long.
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


def from_planes(parts: list[Plane]) -> Array:
    """The codes of which these are the planes, uint8."""
    total: Array = sum((p.values << p.shift for p in parts), np.zeros_like(parts[0].values))
    return total


def halves(plane: Array) -> Array:
    """Bits, uint8 (rows, ...), as 2-bit values (ceil(rows / 2), ...).

    The first half of the rows is in the low bits. An odd number of rows is filled with zeros.
    """
    _check_width(plane, 1)
    rows = -(-len(plane) // 2)
    filled = np.zeros((2 * rows, *plane.shape[1:]), np.uint8)
    filled[: len(plane)] = plane
    joined: Array = filled[:rows] | filled[rows:] << 1
    return joined


def from_halves(joined: Array, rows: int) -> Array:
    """The ``rows`` of bits that ``halves`` joined."""
    apart: Array = np.concatenate([joined & 1, joined >> 1])[:rows]
    return apart


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


def unpacked(raw: bytes, bits: int, shape: tuple[int, ...], *, signed: bool) -> Array:
    """What ``packed`` packed: int8 or uint8 of that shape.

    Raises ValueError where the bytes do not hold that many values.
    """
    count, per_byte = int(np.prod(shape, dtype=np.int64)), 8 // bits
    if len(raw) != -(-count // per_byte):
        raise ValueError(f"{len(raw)} bytes do not hold {count} values of {bits} bits")
    stored = np.frombuffer(raw, np.uint8)
    apart = np.empty(len(raw) * per_byte, np.uint8)
    for i in range(per_byte):
        apart[i::per_byte] = stored >> (bits * i) & (2**bits - 1)
    values = apart[:count].reshape(shape)
    if not signed:
        return values
    top = 1 << (bits - 1)
    return ((values ^ top).astype(np.int16) - top).astype(np.int8)


def _check_width(values: Array, bits: int) -> None:
    if values.dtype not in (np.int8, np.uint8):
        raise ValueError(f"expected int8 or uint8, found {values.dtype}")
    low, high = (
        (0, 2**bits - 1) if values.dtype == np.uint8 else (-(1 << bits - 1), (1 << bits - 1) - 1)
    )
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise ValueError(f"values from {values.min()} to {values.max()} need over {bits} bits")
