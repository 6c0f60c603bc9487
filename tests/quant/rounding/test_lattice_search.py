"""Codes by descent: never worse than where it starts, and optimal where that is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant import Array
from qcompile.quant.rounding.gptq import compensated_codes, damped
from qcompile.quant.rounding.lattice import Lattice, fitted
from qcompile.quant.rounding.lattice_search import descended, output_error
from qcompile.rewriting.testing import normal

properties = settings(deadline=None, derandomize=True, max_examples=40)
sizes = st.integers(1, 70)


def moments(channels: int, seed: int = 0, rows: int = 200) -> Array:
    """Second moments of channels that are mixtures of a quarter as many sources."""
    sources = max(1, channels // 4)
    x = normal(rows, sources, seed=seed) @ normal(sources, channels, seed=seed + 1)
    x = x + np.float32(0.1) * normal(rows, channels, seed=seed + 2)
    gram: Array = x.T @ x
    return gram


def error(w: Array, gram: Array, lattice: Lattice, codes: Array) -> float:
    return float(output_error(w, gram, lattice.real(codes)).sum())


def test_the_error_is_that_of_the_outputs() -> None:
    x, w, other = normal(50, 6), normal(6, 3, seed=1), normal(6, 3, seed=2)
    found = output_error(w, x.T @ x, other)
    assert np.allclose(found, np.square(x @ (w - other)).sum(0), rtol=1e-4)


@given(sizes, st.integers(2, 4), st.integers(1, 80), st.integers(0, 9))
@properties
def test_descent_never_raises_the_error(inputs: int, bits: int, block: int, seed: int) -> None:
    w, gram = normal(inputs, 5, seed=seed), damped(moments(inputs, seed), 0.1)
    assert gram is not None
    lattice = fitted(w, bits, block=block)
    codes = compensated_codes(w, moments(inputs, seed), lattice, 0.1)
    assert codes.dtype == np.uint8 and int(codes.max()) <= lattice.largest_code
    found = descended(w, gram, lattice, codes)
    assert found.dtype == np.uint8 and int(found.max()) <= lattice.largest_code
    before, after = error(w, gram, lattice, codes), error(w, gram, lattice, found)
    assert after <= before * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [None, 32])
def test_each_step_beats_the_one_before(bits: int, block: int | None) -> None:
    """On correlated channels: nearest, with compensation, with descent."""
    w, plain = normal(128, 32), moments(128)
    gram = damped(plain, 0.01)
    assert gram is not None
    lattice = fitted(w, bits, block=block)
    first = compensated_codes(w, plain, lattice, 0.01)
    second = descended(w, gram, lattice, first)
    errors = [
        error(w, gram, lattice, lattice.nearest(w)),
        error(w, gram, lattice, first),
        error(w, gram, lattice, second),
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.5 * errors[0] and errors[2] < errors[1]


def test_a_planted_weight_is_found() -> None:
    """Data in which a pair of inputs is nearly one: only the sum of their weights counts.

    Both weights are .4 steps: nearest gives 0 and 0, a sum of 0; the best sum to .8 is 1.
    """
    gram = np.array([[1.0, 0.99], [0.99, 1.0]], np.float32)
    w = np.full((2, 1), 0.4, np.float32)
    lattice = Lattice(np.ones((1, 1), np.float32), 4, 2, 2)
    assert lattice.real(lattice.nearest(w)).sum() == 0
    for start in (lattice.nearest(w), compensated_codes(w, gram, lattice, 1e-3)):
        assert lattice.real(descended(w, gram, lattice, start)).sum() == 1


def test_no_single_change_lowers_the_error() -> None:
    w, gram = normal(12, 4), damped(moments(12), 0.1)
    assert gram is not None
    lattice = fitted(w, 3)
    found = descended(w, gram, lattice, lattice.nearest(w), sweeps=50)
    least = output_error(w, gram, lattice.real(found))
    for row, step in product(range(12), (-1, 1)):
        changed = found.astype(int)
        changed[row] += step
        codes = np.clip(changed, 0, lattice.largest_code).astype(np.uint8)
        assert (output_error(w, gram, lattice.real(codes)) >= least * (1 - 1e-5)).all()


def test_moments_of_zero_are_nearest() -> None:
    w, lattice = normal(6, 2), fitted(normal(6, 2), 4)
    found = compensated_codes(w, np.zeros((6, 6), np.float32), lattice, 0.1)
    assert np.array_equal(found, lattice.nearest(w))
    assert damped(np.zeros((6, 6), np.float32), 0.1) is None


def test_the_same_input_gives_the_same_codes() -> None:
    w, plain = normal(100, 16), moments(100)
    lattice, gram = fitted(w, 4, block=16), damped(plain, 0.1)
    assert gram is not None
    first, second = (compensated_codes(w, plain, lattice, 0.1) for _ in range(2))
    assert np.array_equal(first, second)
    again = descended(w, gram, lattice, second)
    assert np.array_equal(descended(w, gram, lattice, first), again)
