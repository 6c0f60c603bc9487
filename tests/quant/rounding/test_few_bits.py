"""Weights of few bits: int8 values that few bits hold, of less output error than the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant import Array, QSpec, real
from qcompile.quant.rounding import RoundingProblem, few_bits_rounded, nearest
from qcompile.quant.rounding.block_multipliers import SEVEN_BITS
from qcompile.quant.rounding.few_bits import alternated, fitted_grid
from qcompile.quant.rounding.gptq import compensated_codes, damped
from qcompile.quant.rounding.lattice_search import output_error
from qcompile.quant.weight_rounding import Rounded
from qcompile.rewriting.testing import normal

properties = settings(deadline=None, derandomize=True, max_examples=30)
WIDTHS = st.integers(2, 7)


def spec(width: int, block: int | None = None, axis: int = 1) -> QSpec:
    return QSpec("int8", True, "channel", axis, width=width, block=block)


def moments(channels: int, seed: int = 0) -> Array:
    """Second moments of channels that are mixtures of a quarter as many sources."""
    x = normal(200, max(1, channels // 4), seed=seed)
    x = x @ normal(x.shape[1], channels, seed=seed + 1)
    x = x + np.float32(0.1) * normal(200, channels, seed=seed + 2)
    gram: Array = x.T @ x
    return gram


def error(weight: Array, gram: Array, rounded: Rounded) -> float:
    off = real(rounded) - weight
    return float(np.einsum("io,io->", off, gram @ off))


def codes_fit(values: Array, width: int, block: int | None) -> bool:
    """True where each block, of one output, is codes of that width times one integer."""
    step = block or len(values)
    lowest, highest = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    for start in range(0, len(values), step):
        for column in values[start : start + step].astype(int).T:
            divisor = max(1, int(np.gcd.reduce(column)))
            codes = column // divisor
            if not any(
                lowest <= (sign * codes).min() and (sign * codes).max() <= highest
                for sign in (1, -1)
            ):
                return False
    return True


@properties
@given(width=WIDTHS, inputs=st.integers(1, 70), block=st.sampled_from([None, 16]))
def test_values_are_codes_of_that_width(width: int, inputs: int, block: int | None) -> None:
    block = block if width <= 4 else None
    weight = normal(inputs, 3, seed=inputs)
    for gram in (None, moments(inputs)):
        found = few_bits_rounded(RoundingProblem(weight, spec(width, block), gram))
        assert found.values.dtype == np.int8
        assert np.abs(found.values.astype(int)).max() <= SEVEN_BITS
        assert (found.params.scale > 0).all()
        assert codes_fit(found.values, width, block)


def test_the_check_of_codes_sees_others() -> None:
    values = np.array([[7], [-8], [9]], np.int8)
    assert not codes_fit(values, 4, None)
    assert codes_fit(np.array([[8], [-7]], np.int8), 4, None)  # times -1


@pytest.mark.parametrize(("width", "block"), [(2, 16), (3, 16), (4, None), (4, 16), (6, None)])
def test_outputs_err_less_than_rounded_to_nearest(width: int, block: int | None) -> None:
    weight, gram = normal(48, 12), moments(48)
    best = few_bits_rounded(RoundingProblem(weight, spec(width, block), gram))
    plain = few_bits_rounded(RoundingProblem(weight, spec(width, block)))
    # 12 sources in 48 channels: three quarters of the errors can cancel.
    assert error(weight, gram, best) < 0.5 * error(weight, gram, plain)


def test_nearest_takes_tables_and_kernels() -> None:
    """Scales are along the channels' axis, and rounding one axis is rounding the other's turn."""
    table = normal(5, 40)
    by_row = nearest(table, spec(4, 16, axis=0))
    by_column = nearest(np.ascontiguousarray(table.T), spec(4, 16))
    assert by_row.params.scale.shape == (5,)
    np.testing.assert_array_equal(by_row.values, by_column.values.T)
    kernel = normal(4, 3, 2, 2)
    assert nearest(kernel, spec(5, axis=0)).values.shape == kernel.shape


@pytest.mark.parametrize("width", range(2, 8))
def test_more_bits_err_less(width: int) -> None:
    weight = normal(64, 8)
    fewer, more = (np.square(real(nearest(weight, spec(w))) - weight).sum() for w in (2, width))
    # Each bit halves the step; the sum of squares falls with its square, at least by half of that.
    assert more <= fewer / 2.0 ** (width - 2)


def test_row_factors_are_whole_and_cost_nothing() -> None:
    """With factors, the integers represent ``factor · weight`` as well as without them."""
    weight, gram = normal(32, 6), moments(32)
    factors = np.where(np.arange(32) % 5 == 0, 2, 1).astype(np.uint8)
    plain = few_bits_rounded(RoundingProblem(weight, spec(4), gram))
    found = few_bits_rounded(RoundingProblem(weight, spec(4), gram, row_factors=factors))
    np.testing.assert_array_equal(found.values, plain.values * factors[:, None].astype(np.int8))
    np.testing.assert_array_equal(found.params.scale, plain.params.scale)


@pytest.mark.parametrize("gram", [None, np.zeros((4, 4), np.float32)])
def test_without_moments_each_value_goes_to_its_nearest(gram: Array | None) -> None:
    weight = np.array([[-8, 7], [3, -8], [1, 0], [0, 2]], np.float32)
    found = few_bits_rounded(RoundingProblem(weight, spec(4), gram))
    np.testing.assert_allclose(real(found), weight, rtol=1e-6)


def test_zeros_stay_zeros() -> None:
    found = nearest(np.zeros((16, 2), np.float32), spec(2, 16))
    assert not found.values.any()


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.full((4, 3), np.nan)])
def test_refused(values: Array) -> None:
    with pytest.raises(ValueError, match=r"values|NaN"):
        nearest(values.astype(np.float32), spec(4))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"width": 1}, "expected 2 to 7"),
        ({"width": 8}, "expected 2 to 7"),
        ({"block": 16}, "weights of few bits"),
        ({"width": 4, "paired": True}, "no other bound"),
    ],
)
def test_specs_that_make_no_sense(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QSpec("int8", True, "channel", 1, **settings_)


def test_spec_as_text() -> None:
    assert str(spec(4, 32)) == "int8:sym:channel[1]:4-bit:block 32"
    assert spec(4).bits == 4


def test_descent_on_codes_and_scales_beats_compensation() -> None:
    weight, gram = normal(128, 32), damped(moments(128), 0.01)
    assert gram is not None
    grid = fitted_grid(weight, 3, 32)
    codes = compensated_codes(weight, moments(128), grid.lattice, 0.01)
    found, best = alternated(weight, gram, grid, codes)
    first, last = (
        float(output_error(weight, gram, g.lattice.real(c)).sum())
        for g, c in ((grid, codes), (found, best))
    )
    assert last < 0.98 * first
    np.testing.assert_array_equal(found.multipliers, grid.multipliers)
