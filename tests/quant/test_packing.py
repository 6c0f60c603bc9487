"""Few bits as bytes, against the packing of the onnx package; planes are exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from qcompile.quant import Array
from qcompile.quant.packing import (
    PLANES,
    nibbles,
    packed,
    plane_spans,
    planes,
)

properties = settings(deadline=None, derandomize=True, max_examples=80)
ONNX_TYPES = {
    (2, True): onnx.TensorProto.INT2,
    (2, False): onnx.TensorProto.UINT2,
    (4, True): onnx.TensorProto.INT4,
    (4, False): onnx.TensorProto.UINT4,
    (8, True): onnx.TensorProto.INT8,
    (8, False): onnx.TensorProto.UINT8,
}
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


def integers(shape: tuple[int, ...], bits: int, seed: int, *, signed: bool) -> Array:
    low = -(2 ** (bits - 1)) if signed else 0
    drawn = np.random.default_rng(seed).integers(low, low + 2**bits, shape)
    return drawn.astype(np.int8 if signed else np.uint8)


def tensor(raw: bytes, bits: int, shape: tuple[int, ...], *, signed: bool) -> onnx.TensorProto:
    return helper.make_tensor("w", ONNX_TYPES[bits, signed], shape, raw, raw=True)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@given(shape=shapes, seed=st.integers(0, 99))
@properties
def test_bytes_are_those_of_onnx(
    bits: int, shape: tuple[int, ...], seed: int, *, signed: bool
) -> None:
    values = integers(shape, bits, seed, signed=signed)
    raw = packed(values, bits)
    theirs = numpy_helper.to_array(tensor(raw, bits, shape, signed=signed))
    assert np.array_equal(theirs.astype(np.int16), values)
    assert numpy_helper.from_array(theirs).raw_data == raw


def test_the_first_value_is_in_the_low_bits() -> None:
    assert packed(np.array([1, 2, 3], np.uint8), 4) == bytes([0x21, 0x03])
    assert packed(np.array([-1, 0, 1, -2, 1], np.int8), 2) == bytes([0b10_01_00_11, 0b01])


@given(st.sampled_from(list(PLANES)), shapes, st.integers(0, 99))
@properties
def test_planes_hold_every_bit_once(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = integers(shape, bits, seed, signed=False)
    parts = planes(codes, bits)
    assert np.array_equal(sum(p.values << p.shift for p in parts), codes)
    assert sum(p.bits for p in parts) == bits
    assert all(high.shift == low.shift + low.bits for high, low in pairwise(parts))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("bits", [2, 4])
def test_values_of_more_bits_are_refused(bits: int, dtype: type) -> None:
    top = 2 ** (bits - 1) - 1 if dtype is np.int8 else 2**bits - 1
    packed(np.array([top], dtype), bits)
    with pytest.raises(ValueError, match=f"need over {bits} bits"):
        packed(np.array([top + 1], dtype), bits)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="packs 2, 4 or 8"):
        packed(np.zeros(3, np.uint8), 3)
    with pytest.raises(ValueError, match="expected int8 or uint8, found int64"):
        packed(np.zeros(3, np.int64), 4)
    with pytest.raises(ValueError, match="expected one of"):
        planes(np.zeros(3, np.uint8), 9)
    with pytest.raises(ValueError, match="need over 3 bits"):
        planes(np.array([8], np.uint8), 3)


@given(st.integers(2, 7), st.integers(1, 40), st.integers(0, 9))
@properties
def test_nibbles_hold_all_planes(bits: int, count: int, seed: int) -> None:
    """Every code is read again from its planes, whatever fills the last nibbles."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    flat = nibbles(codes, bits)
    assert flat.dtype == np.uint8 and flat.max(initial=0) < 16
    total = np.zeros(count, np.uint8)
    for width, shift, start, stop in plane_spans(bits, count):
        part = flat[start:stop]
        pieces = [part >> low & (2**width - 1) for low in range(0, 4, width)]
        total |= np.concatenate(pieces)[:count] << shift
    assert stop == len(flat) and np.array_equal(total, codes)
