"""Codes of few bits are found in int8 values, and give exactly these values."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant.stored_codes import BLOCKS, StoredCodes, stored_codes
from qcompile.quant.types import Array

# The function of that name hides it.
module = importlib.import_module("qcompile.quant.stored_codes")
properties = settings(deadline=None, derandomize=True, max_examples=60)


def random(low: int, high: int, *shape: int, seed: int = 0) -> Array:
    """Integers from low to high, both included."""
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int16)


def codes_of(bits: int, inputs: int, outputs: int, seed: int = 0) -> Array:
    """All codes of that width, signed, int16."""
    return random(-(1 << bits - 1), (1 << bits - 1) - 1, inputs, outputs, seed=seed)


def found(values: Array) -> StoredCodes:
    """The codes of these values, which they must give back."""
    matrix = values.astype(np.int8)
    assert np.array_equal(matrix, values)
    codes = stored_codes(matrix)
    assert codes is not None
    assert codes.codes.dtype == np.uint8 and codes.codes.max() < 1 << codes.bits
    assert np.array_equal(codes.values(), matrix) and codes.values().dtype == np.int8
    return codes


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_alone(bits: int) -> None:
    codes = found(codes_of(bits, 50, 40))
    assert codes.bits == bits and codes.multipliers is None and codes.row_factors is None
    assert codes.block is None and codes.nbytes == 50 * 40 * bits // 8


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("inputs", [256, 300])
def test_multipliers_of_blocks_have_a_sign(block: int, inputs: int) -> None:
    """300 is no multiple of any block: the last one is shorter."""
    multipliers = random(1, 7, -(-inputs // block), 64, seed=1)
    multipliers[:, ::3] *= -1
    signed = codes_of(4, inputs, 64)
    signed[::block] = -8  # else the other sign would do as well
    values = signed * np.repeat(multipliers, block, axis=0)[:inputs]
    codes = found(values)
    assert (codes.bits, codes.block, codes.multiplier_bits) == (4, block, 4)
    assert codes.multipliers is not None and codes.multipliers.dtype == np.int8
    assert np.array_equal(codes.multipliers, multipliers)
    assert codes.nbytes == inputs * 32 + multipliers.size // 2


def test_one_multiplier_for_each_output() -> None:
    """Signs alone: -8 and 8 do not fit into 4 bits with one sign."""
    values = codes_of(4, 90, 50) * np.where(np.arange(50) % 2, -1, 1)
    codes = found(values)
    assert codes.bits == 4 and codes.block == 90
    assert codes.multipliers is not None and codes.multipliers.shape == (1, 50)


def test_multipliers_beyond_four_bits() -> None:
    multipliers = random(9, 15, 8, 64, seed=1)
    codes = found(codes_of(4, 256, 64) * np.repeat(multipliers, 32, axis=0))
    assert (codes.bits, codes.block, codes.multiplier_bits) == (4, 32, 8)


def test_eight_is_stored_as_minus_eight() -> None:
    values = codes_of(4, 64, 64).clip(-7) * np.repeat(random(7, 8, 4, 64, seed=1), 16, axis=0)
    codes = found(values)
    assert (codes.block, codes.multiplier_bits) == (16, 4)
    assert codes.multipliers is not None and codes.multipliers.min() == -8


def test_row_factors() -> None:
    factors = np.random.default_rng(1).choice([1, 2, 4], 80)
    codes = found(codes_of(5, 80, 64) * factors[:, None])
    assert codes.bits == 5 and codes.row_factors is not None
    assert np.array_equal(codes.row_factors, factors) and codes.row_factors.dtype == np.uint8


def test_row_factors_and_multipliers() -> None:
    factors = np.random.default_rng(1).choice([1, 2], 128)
    multipliers = random(1, 4, 4, 64, seed=2)
    values = codes_of(4, 128, 64) * np.repeat(multipliers, 32, axis=0) * factors[:, None]
    codes = found(values)
    assert (codes.bits, codes.block) == (4, 32) and codes.row_factors is not None


def test_a_large_divisor_by_chance_does_not_widen_the_multipliers() -> None:
    """A block with one value, 35, is 5 · 7 and not 1 · 35."""
    values = codes_of(4, 64, 64) * np.repeat(random(2, 7, 4, 64, seed=1), 16, axis=0)
    values[:16, 0] = 0
    values[3, 0] = 35
    codes = found(values)
    assert (codes.block, codes.multiplier_bits) == (16, 4)
    assert codes.multipliers is not None and codes.multipliers[0, 0] == 5


def test_zeros() -> None:
    codes = found(np.zeros((40, 6), np.int16))
    assert codes.bits == 2 and codes.multipliers is None and codes.row_factors is None
    values = codes_of(4, 64, 40) * np.repeat(random(1, 7, 4, 40, seed=1), 16, axis=0)
    values[16:32] = 0
    values[:, 5] = 0
    values[3] = 0
    assert found(values).bits == 4


def test_what_needs_eight_bits() -> None:
    assert stored_codes(random(-127, 127, 64, 64).astype(np.int8)) is None
    assert stored_codes(random(-128, 127, 64, 64).astype(np.int8)) is None
    assert stored_codes(random(-127, 127, 300, 7).astype(np.int8)) is None
    assert stored_codes(np.array([[-128, 127, 5]], np.int8)) is None


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_matrix_has_nothing_to_store(shape: tuple[int, int]) -> None:
    assert stored_codes(np.zeros(shape, np.int8)) is None


def test_the_sample_decides_only_where_it_has_seen_eight_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = codes_of(4, 64, 500)
    values[7, 499], values[8, 499] = 127, -127  # the last output is in the sample
    assert stored_codes(values.astype(np.int8)) is None
    values[7:9, 499], values[7, 498], values[8, 498] = 1, 127, -127  # not in the sample
    assert stored_codes(values.astype(np.int8)) is None
    looked_at, cheapest = [], module._cheapest

    def noting(some: Array) -> object:
        looked_at.append(some.shape[1])
        return cheapest(some)

    monkeypatch.setattr(module, "_cheapest", noting)
    stored_codes(random(-127, 127, 64, 500).astype(np.int8))
    assert looked_at == [32]


def test_large_matrices_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    values = codes_of(4, 64, 50) * np.repeat(random(-7, -1, 4, 50, seed=1), 16, axis=0)
    whole = found(values)
    monkeypatch.setattr(module, "_CHUNK", 3 * 64)
    apart = found(values)
    assert np.array_equal(apart.codes, whole.codes) and apart.block == whole.block == 16


@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(2, 7), st.integers(1, 40), st.integers(0, 9)
)
@properties
def test_any_shape_and_block(inputs: int, outputs: int, bits: int, block: int, seed: int) -> None:
    """Where codes are found they are exact and smaller; never more bits than went in."""
    codes = codes_of(bits, inputs, outputs, seed)
    most = max(1, 64 >> bits - 1)
    signs = np.where(random(0, 1, -(-inputs // block), outputs, seed=seed + 2), 1, -1)
    multipliers = random(1, most, -(-inputs // block), outputs, seed=seed + 1) * signs
    values = (codes * np.repeat(multipliers, block, axis=0)[:inputs]).astype(np.int8)
    result = stored_codes(values)
    if result is not None:
        assert np.array_equal(result.values(), values)
        assert result.nbytes < values.size
    if block == 16 and inputs * outputs > 1000 and bits <= 6:
        assert result is not None and result.bits <= bits


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.uint8), np.zeros(4, np.int8)])
def test_other_arrays_are_an_error(values: Array) -> None:
    with pytest.raises(ValueError, match="expected an int8 matrix, found"):
        stored_codes(values)
