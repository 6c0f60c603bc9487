"""Scales of few bits: the laws of rounding to them, and that they cost least."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.quant import Array
from qcompile.quant.rounding.lattice import Lattice, fitted
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.session import Session

properties = settings(deadline=None, derandomize=True, max_examples=60)
floats = st.floats(-(2.0**20), 2.0**20, width=32)
weights = st.integers(1, 9).flatmap(lambda n: arrays(np.float32, (n, 3), elements=floats))


def squared_error(w: Array, lattice: Lattice) -> float:
    return float(np.square(lattice.real(lattice.nearest(w)) - w, dtype=np.float64).sum())


@given(weights, st.integers(2, 8), st.integers(1, 5))
@properties
def test_codes_have_their_bits_and_real_values_are_fixed(w: Array, bits: int, block: int) -> None:
    lattice = fitted(w, bits, block=block)
    codes = lattice.nearest(w)
    assert codes.shape == w.shape and int(codes.max()) <= 2**bits - 1
    assert np.array_equal(lattice.nearest(lattice.real(codes)), codes)
    assert np.isfinite(lattice.scale).all() and lattice.scale.all()


@given(weights, st.integers(2, 4), st.integers(0, 9))
@properties
def test_nearest_is_nearest(w: Array, bits: int, code: int) -> None:
    """No other code of the same lattice is closer, up to float32."""
    lattice = fitted(w, bits)
    other = np.full(w.shape, min(code, lattice.largest_code), np.uint8)
    error = np.abs(lattice.real(lattice.nearest(w)) - w)
    assert (error <= np.abs(lattice.real(other) - w) * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_pays_and_blocks_pay(bits: int) -> None:
    w = normal(96, 8)
    lattice = fitted(w, bits)
    least = squared_error(w, lattice)
    wide = Lattice(lattice.scale * 1.5, bits, 96, 96)
    assert least < squared_error(w, wide)
    assert squared_error(w, fitted(w, bits, block=16)) < least


def test_outputs_are_fitted_separately() -> None:
    """Also where a weight is so large that it is fitted in parts."""
    w = normal(40, 9000)
    whole, last = fitted(w, 2, block=32), fitted(w[:, -3:], 2, block=32)
    assert np.array_equal(whole.scale[:, -3:], last.scale)


def test_zeros_are_exact() -> None:
    w = np.zeros((5, 2), np.float32)
    lattice = fitted(w, 3, block=2)
    assert np.array_equal(lattice.real(lattice.nearest(w)), w)


@pytest.mark.parametrize("rows", [8, 11])
def test_real_values_are_those_of_onnx(rows: int) -> None:
    """DequantizeLinear in blocks, with a last one that is shorter."""
    w = normal(rows, 3)
    lattice = fitted(w, 4, block=4)
    codes = lattice.nearest(w)
    text = (
        "g (float[1] x) => (float[n, m] y) {"
        "d = DequantizeLinear <axis = 0, block_size = 4> (q, s, z) y = Add(d, x)}"
    )
    zero = np.full(lattice.scale.shape, lattice.middle, np.uint8)
    model = model_proto(text, 21, q=codes, s=lattice.scale, z=zero)
    found = Session(model.SerializeToString()).run({"x": np.zeros(1, np.float32)})["y"]
    assert np.array_equal(found, lattice.real(codes))


def test_what_has_no_lattice_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        fitted(np.array([[np.inf]], np.float32), 4)
    with pytest.raises(ValueError, match="matrix"):
        fitted(np.zeros((0, 3), np.float32), 4)
    with pytest.raises(ValueError, match="2 to 8"):
        fitted(normal(4, 2), 1)
    with pytest.raises(ValueError, match="do not fit 9 inputs"):
        Lattice(np.ones((2, 3), np.float32), 4, 9, 4)
