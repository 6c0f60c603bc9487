"""Integers of few bits in an int8 matrix: found from its values, without loss.

A weight of few bits is an ordinary int8 matrix until it is written: its values are codes, or codes
times a small integer for each block of inputs and for each input. Which ones follows from the
values, by greatest common divisors, so nothing has to be carried along with the constant:

    value = (code - 2^(bits - 1)) · multiplier · row factor
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcompile.quant.types import FEW_BITS, Array

# Inputs that share a multiplier. A larger block is several smaller ones.
BLOCKS = (128, 64, 32, 16)
_FINEST = BLOCKS[-1]
# Multipliers in the order of preference: of small magnitude, and -8 before 8 as it fits into int4.
_MULTIPLIERS = sorted(
    (sign * size for size in range(1, 128) for sign in (1, -1)),
    key=lambda multiplier: (abs(multiplier), (multiplier < 0) != (abs(multiplier) == 8)),
)
LEAST_SAVED = 1 << 12  # bytes for which packing pays: the nodes that unpack take some hundred
# Outputs looked at before all of them are.
_SAMPLE = 32
_CHUNK = 1 << 22  # values; limits what a large table needs in memory


@dataclass(frozen=True)
class StoredCodes:
    """An int8 matrix (inputs, outputs) as codes of few bits.

    codes: uint8 (inputs, outputs), less than 2^bits. multipliers: int8 (ceil(inputs / block),
    outputs), or None for ones. row_factors: uint8 (inputs,), or None for ones. ``block`` is set
    where multipliers are; it is the number of inputs where one multiplier is for a whole output.
    """

    codes: Array
    bits: int
    multipliers: Array | None = None
    block: int | None = None
    row_factors: Array | None = None

    def values(self) -> Array:
        """The matrix, int8 (inputs, outputs)."""
        found = self.codes.astype(np.int16) - (1 << self.bits - 1)
        if self.multipliers is not None and self.block is not None:
            found *= np.repeat(self.multipliers, self.block, axis=0)[: len(found)]
        if self.row_factors is not None:
            found *= self.row_factors[:, None]
        return found.astype(np.int8)

    @property
    def multiplier_bits(self) -> int:
        """Bits of one multiplier in the file: 4 where all are in -8..7, else 8."""
        return 4 if self.multipliers is None or _in_int4(self.multipliers) else 8

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without those of nodes and scales."""
        size = -(-self.codes.size * self.bits // 8)
        if self.multipliers is not None:
            size += -(-self.multipliers.size * self.multiplier_bits // 8)
        return size + (0 if self.row_factors is None else len(self.row_factors))


@dataclass(frozen=True)
class _Extent:
    """What is known about each block: greatest common divisor (0: only zeros), extrema."""

    divisor: Array
    low: Array
    high: Array

    def merged(self, count: int) -> _Extent:
        """The same for blocks of ``count`` of these."""
        starts = np.arange(0, len(self.divisor), count)
        return _Extent(
            np.gcd.reduceat(self.divisor, starts),
            np.minimum.reduceat(self.low, starts),
            np.maximum.reduceat(self.high, starts),
        )


@dataclass(frozen=True)
class _Scheme:
    """How a matrix can be stored, and what that takes."""

    bits: int
    multipliers: Array | None
    block: int | None
    row_factors: Array | None
    nbytes: int


def stored_codes(values: Array) -> StoredCodes | None:
    """The smallest such form of a matrix in bytes; None where its values need 8 bits each.

    values: int8 (inputs, outputs). A table of rows is passed as its transpose. ``values()`` of the
    result is equal to them. An empty matrix has nothing to store. Raises ValueError on another
    type or rank.
    """
    if values.dtype != np.int8 or values.ndim != 2:
        raise ValueError(f"expected an int8 matrix, found {values.dtype} {values.shape}")
    if not values.size:
        return None
    some = np.unique(np.linspace(0, values.shape[1] - 1, _SAMPLE).astype(np.int64))
    if len(some) < values.shape[1] and _cheapest(values[:, some]) is None:
        return None
    scheme = _cheapest(values)
    if scheme is None or scheme.nbytes >= values.size:
        return None
    codes = np.empty(values.shape, np.uint8)
    for columns in _chunks(values):
        codes[:, columns] = _codes(values, scheme, columns)
    return StoredCodes(codes, scheme.bits, scheme.multipliers, scheme.block, scheme.row_factors)


def repeated_rows(values: Array) -> Array:
    """For each of the last rows that all repeat rows before them, which one, int64 (n,).

    ``split-outliers`` appends such rows. They come from different blocks, so no multiplier is
    common to a block of them.
    """
    seen: dict[bytes, int] = {}
    first = np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(values)])
    new = np.flatnonzero(first == np.arange(len(first)))  # rows that repeat none
    return first[new[-1] + 1 :]


def _cheapest(values: Array) -> _Scheme | None:
    """The scheme of fewest bytes that has at most 7 bits; the coarser one of equals."""
    factors = _row_factors(values)
    schemes = list(_schemes(values, None))
    if factors is not None:
        schemes += _schemes(values, factors)
    return min(schemes, key=lambda scheme: scheme.nbytes, default=None)


def _schemes(values: Array, factors: Array | None) -> Iterator[_Scheme]:
    """With no multipliers, one for each output, and one for each block."""
    inputs = len(values)
    fixed = 0 if factors is None else inputs
    finest = _extent(values, factors)
    whole = finest.merged(len(finest.divisor))
    plain = _bits(int(max(whole.high.max(), -whole.low.min() - 1)))
    if plain in FEW_BITS:
        yield _Scheme(plain, None, None, factors, fixed + -(-values.size * plain // 8))
    for block in (inputs, *(block for block in BLOCKS if block < inputs)):
        extent = whole if block == inputs else finest.merged(block // _FINEST)
        bits = _fewest_bits(extent)
        if bits in FEW_BITS:
            multipliers = _multipliers(extent, bits)
            width = 4 if _in_int4(multipliers) else 8
            size = fixed + -(-values.size * bits // 8) + -(-multipliers.size * width // 8)
            yield _Scheme(bits, multipliers, block, factors, size)


def _row_factors(values: Array) -> Array | None:
    """1, 2 or 4 for each input: the largest of them that divides its values; None for ones."""
    lowest = np.bitwise_or.reduce(values, axis=1)
    factors = np.where(lowest & 1, 1, np.where(lowest & 2, 2, 4)).astype(np.uint8)
    factors[~values.any(axis=1)] = 1
    return None if (factors == 1).all() else factors


def _extent(values: Array, factors: Array | None) -> _Extent:
    """Of blocks of ``_FINEST`` inputs, after division by the row factors."""
    starts = np.arange(0, len(values), _FINEST)
    parts = []
    for columns in _chunks(values):
        part = values[:, columns].astype(np.int16)
        if factors is not None:
            part //= factors[:, None]
        parts.append(
            (
                np.gcd.reduceat(np.abs(part).astype(np.uint8), starts).astype(np.int16),
                np.minimum.reduceat(part, starts),
                np.maximum.reduceat(part, starts),
            )
        )
    return _Extent(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def _fewest_bits(extent: _Extent) -> int:
    """Width of the codes with the best multiplier for each block."""
    divisor = np.maximum(extent.divisor, 1)
    low, high = extent.low // divisor, extent.high // divisor
    magnitude = np.minimum(np.maximum(high, -low - 1), np.maximum(-low, high - 1))
    return _bits(int(magnitude.max()))


def _bits(magnitude: int) -> int:
    """Width of two's complement from -magnitude - 1 to magnitude, at least 2."""
    return max(2, 1 + magnitude.bit_length())


def _multipliers(extent: _Extent, bits: int) -> Array:
    """For each block the first of ``_MULTIPLIERS`` with which its codes have so many bits."""
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1
    found = np.zeros(extent.divisor.shape, np.int8)
    for multiplier in _MULTIPLIERS:
        ends = np.sort(np.stack([extent.low, extent.high]) // multiplier, axis=0)
        fits = (extent.divisor % multiplier == 0) & (ends[0] >= least) & (ends[1] <= most)
        found[fits & (found == 0)] = multiplier
        if found.all():
            break
    return found


def _codes(values: Array, scheme: _Scheme, columns: slice) -> Array:
    part = values[:, columns].astype(np.int16)
    if scheme.row_factors is not None:
        part //= scheme.row_factors[:, None]
    if scheme.multipliers is not None and scheme.block is not None:
        part //= np.repeat(scheme.multipliers[:, columns], scheme.block, axis=0)[: len(part)]
    codes: Array = (part + (1 << scheme.bits - 1)).astype(np.uint8)
    return codes


def _chunks(values: Array) -> Iterator[slice]:
    """All columns, as many at a time as make ``_CHUNK`` values."""
    inputs, outputs = values.shape
    step = max(1, _CHUNK // inputs)
    for start in range(0, outputs, step):
        yield slice(start, start + step)


def _in_int4(multipliers: Array) -> bool:
    return bool(multipliers.min() >= -8 and multipliers.max() <= 7)
