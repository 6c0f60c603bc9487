"""Weights in blocks: exactly the values of the int8 weight, in the fewest bits that are taken."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.planning import BlockRows, block_rows, fitting_block
from qcompile.quant import Array

TAKEN = {2: (32, 128), 4: (16, 128), 8: (16, 128)}
SCALE = np.array([1, -2, 3, 0.5, 0.1], np.float32)


def codes(bits: int, inputs: int, rows: int = 5) -> Array:
    """All signed codes of that many bits, as rows."""
    low = -(1 << bits - 1)
    return np.random.default_rng(bits).integers(low, -low, (rows, inputs), np.int8)


def in_blocks(bits: int, inputs: int, block: int) -> Array:
    """Codes times multipliers of both signs, which differ from block to block."""
    signs = np.resize(np.array([1, -3, 5, 7, -8], np.int8), -(-inputs // block))
    multipliers = np.stack([np.roll(signs, i) for i in range(5)])
    values: Array = codes(bits, inputs) * np.repeat(multipliers, block, axis=1)[:, :inputs]
    return values


def real(found: BlockRows) -> Array:
    """What the operators compute with, from the packed bytes; float64 (rows, inputs)."""
    rows, inputs = found.codes.shape
    shifts = np.arange(0, 8, found.bits, dtype=np.uint8)
    apart = found.packed[..., None] >> shifts & (2**found.bits - 1)
    signed = apart.reshape(rows, -1).astype(np.float64) - (1 << found.bits - 1)
    assert not signed[:, inputs:].any()
    times = np.repeat(found.scales.astype(np.float64), found.block, axis=1)
    values: Array = (signed * times)[:, :inputs]
    return values


def assert_exact(found: BlockRows, values: Array) -> None:
    """Equal up to one rounding of a scale times a multiplier."""
    expected = values * SCALE[:, None].astype(np.float64)
    np.testing.assert_allclose(real(found), expected, rtol=2.0**-23)


@pytest.mark.parametrize("inputs", [1, 16, 33, 128, 200])
@pytest.mark.parametrize(("bits", "stored"), [(2, 2), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)])
def test_codes_of_whole_rows(bits: int, stored: int, inputs: int) -> None:
    values = codes(bits, inputs)
    values[:, 0] = -(1 << bits - 1)  # of full width also where there is one value
    values[0, 0] = 1 - (1 << bits - 1)  # ... that no multiplier explains
    if inputs == 1:
        values[1:] = 0
    found = block_rows(values, SCALE, TAKEN)
    assert found.bits <= stored
    if inputs > 1:
        assert found.bits == stored
        assert found.block == fitting_block(TAKEN[stored][0], 128, inputs)
    assert_exact(found, values)


@pytest.mark.parametrize(
    ("bits", "block", "stored", "written"),
    [
        *((4, block, 4, block) for block in (16, 32, 64, 128)),
        *((2, block, 2, block) for block in (32, 64, 128)),
        (2, 16, 4, 16),
        (3, 32, 4, 32),
    ],
)
@pytest.mark.parametrize("inputs", [256, 250, 129])
def test_codes_in_blocks(bits: int, block: int, stored: int, written: int, inputs: int) -> None:
    """The multipliers of both signs go into the scales."""
    values = in_blocks(bits, inputs, block)
    found = block_rows(values, SCALE, TAKEN)
    assert (found.bits, found.block) == (stored, written)
    assert found.packed.shape == (5, -(-inputs // written), written * stored // 8)
    assert_exact(found, values)


def test_blocks_may_be_no_longer_than_the_operator_takes() -> None:
    values = in_blocks(4, 256, 128)
    found = block_rows(values, SCALE, {4: (16, 32), 8: (16, 32)})
    assert (found.bits, found.block, found.scales.shape) == (4, 32, (5, 8))
    assert_exact(found, values)


@pytest.mark.parametrize(
    ("values", "taken", "stored", "reason"),
    [
        (in_blocks(2, 256, 16), TAKEN, 4, "2 bits in blocks of 16, and are stored in 4: the"),
        (in_blocks(4, 256, 16), {4: (32, 64), 8: (32, 64)}, 8, "takes blocks of a power of two"),
        (codes(3, 64), TAKEN, 4, "3 bits, and are stored in 4: the operator takes 2, 4, 8"),
        (codes(6, 64), TAKEN, 8, "6 bits, and are stored in 8: the operator takes 2, 4, 8"),
        (codes(2, 64), {4: (16, 128), 8: (16, 128)}, 4, "the operator takes 4, 8"),
    ],
)
def test_codes_that_the_operator_does_not_take(
    values: Array, taken: dict[int, tuple[int, int]], stored: int, reason: str
) -> None:
    found = block_rows(values, SCALE, taken)
    assert found.bits == stored
    assert found.refusal is not None and reason in found.refusal.reason
    assert_exact(found, values)


def test_weights_of_8_bits_are_no_refusal() -> None:
    values = np.random.default_rng(0).integers(-127, 128, (5, 200), np.int8)
    found = block_rows(values, SCALE, TAKEN)
    assert (found.bits, found.refusal) == (8, None)
    assert_exact(found, values)


@pytest.mark.parametrize(("bits", "stored"), [(2, 4), (3, 4), (4, 8)])
def test_factors_of_inputs_go_into_the_codes(bits: int, stored: int) -> None:
    """Two or four times as large: 1 or 2 bits more, 4 bits as long as they fit."""
    factors = np.resize(np.array([1, 2], np.int8), 256)
    values = in_blocks(bits, 256, 32) * factors
    found = block_rows(values, SCALE, TAKEN)
    assert found.bits == stored
    assert_exact(found, values)


def test_a_byte_more_or_less_is_seen() -> None:
    """The comparison of these tests fails for codes that differ in one value."""
    values = in_blocks(4, 256, 32)
    found = block_rows(values, SCALE, TAKEN)
    found.codes[2, 3] ^= 1
    with pytest.raises(AssertionError):
        assert_exact(found, values)
