"""Block scales as small integers: what the kernel multiplies is what was rounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant import Array
from qcompile.quant.rounding.block_multipliers import SEVEN_BITS, rebased, with_multipliers
from qcompile.quant.rounding.lattice import Lattice, fitted
from qcompile.quant.rounding.lattice_search import output_error
from qcompile.rewriting.testing import normal

properties = settings(deadline=None, derandomize=True, max_examples=60)


def weight(inputs: int, outputs: int, seed: int = 0) -> Array:
    """Rows of very different sizes, so that blocks have very different scales."""
    sizes = np.exp(normal(inputs, 1, seed=seed + 1))
    return (normal(inputs, outputs, seed=seed) * sizes).astype(np.float32)


def error(w: Array, lattice: Lattice) -> float:
    return float(np.square(lattice.real(lattice.nearest(w)) - w).sum())


@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 20))
@properties
def test_integers_times_base_are_the_real_values(inputs: int, bits: int, seed: int) -> None:
    w = weight(inputs, 3, seed)
    found = with_multipliers(w, fitted(w, bits, block=8), most=7)
    codes = found.lattice.nearest(w)
    integers = found.integers(codes)
    assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max() <= SEVEN_BITS
    assert np.allclose(integers * found.base, found.lattice.real(codes), rtol=1e-6)
    assert found.multipliers.all() and np.abs(found.multipliers).max() <= 7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_multipliers_are_nearly_as_good_as_floats(bits: int) -> None:
    """Far better than one scale per output, with multipliers up to 9 or more."""
    w = weight(128, 16)
    blocks = fitted(w, bits, block=16)
    found = error(w, with_multipliers(w, blocks, most=15, largest=127).lattice)
    assert found < 1.4 * error(w, blocks)
    assert found < 0.8 * error(w, fitted(w, bits))


def test_multipliers_are_lowered_to_what_fits() -> None:
    w = weight(64, 4)
    found = with_multipliers(w, fitted(w, 4, block=8), most=100)
    assert np.abs(found.multipliers).max() == SEVEN_BITS // 8
    with pytest.raises(ValueError, match="exceed 64 without multipliers"):
        with_multipliers(w, fitted(w, 8, block=8), most=7)
    assert with_multipliers(w, fitted(w, 7, block=8), most=7).multipliers.max() == 1


def test_bases_are_least_squares() -> None:
    """Any other base of an output has a larger error; codes and multipliers stay."""
    x = normal(200, 32, seed=5) @ normal(32, 32, seed=6)
    moments, w = x.T @ x, weight(32, 4)
    found = with_multipliers(w, fitted(w, 3, block=8), most=7)
    codes = found.lattice.nearest(w)
    best = rebased(w, moments, found, codes)
    least = output_error(w, moments, best.lattice.real(codes))
    assert (least <= output_error(w, moments, found.lattice.real(codes))).all()
    for share in (0.99, 1.01):
        assert (output_error(w, moments, best.lattice.real(codes) * share) >= least).all()
    assert np.allclose(best.integers(codes) * best.base, best.lattice.real(codes), rtol=1e-6)
    assert np.array_equal(best.multipliers, found.multipliers)


def test_a_weight_of_zeros_keeps_its_bases() -> None:
    w = np.zeros((8, 2), np.float32)
    found = with_multipliers(w, fitted(w, 4, block=4), most=7)
    best = rebased(w, np.eye(8), found, found.lattice.nearest(w))
    assert (
        np.array_equal(best.base, found.base) and not best.integers(best.lattice.nearest(w)).any()
    )


@pytest.mark.parametrize("block", [4, 20])
def test_row_factors_undo_what_the_data_was_divided_by(block: int) -> None:
    w = weight(20, 3)
    factors = np.where(np.arange(20) == 5, 4, 1).astype(np.uint8)
    found = with_multipliers(w, fitted(w, 4, block=block), most=7, row_factors=factors)
    codes = found.lattice.nearest(w)
    integers = found.integers(codes).astype(int)
    assert np.abs(integers).max() <= SEVEN_BITS
    kernel = integers * found.base
    assert np.allclose(kernel, found.lattice.real(codes) * factors[:, None], rtol=1e-6)
    assert np.abs(found.multipliers[5 // block]).max() <= 2  # 8 codes · 4 · 2 = 64
    with pytest.raises(ValueError, match="exceed 64"):
        with_multipliers(w, fitted(w, 4, block=block), most=7, row_factors=factors * 4)


def test_row_factors_keep_the_steps_of_the_weight() -> None:
    """One scale per output: the factor moved into the weight widens all of its steps."""
    w = normal(64, 8)
    factors = np.where(np.arange(64) == 5, 4, 1).astype(np.uint8)[:, None]
    moved = fitted(w * factors, 4)
    kept = with_multipliers(w, fitted(w, 4), most=1, row_factors=factors[:, 0]).lattice
    in_the_weight = moved.real(moved.nearest(w * factors)) / factors
    assert error(w, kept) < 0.7 * float(np.square(in_the_weight - w).sum())
