"""MSE: the error model against real quantization, and optima in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibrators.mse import Mse, expected_error
from qcompile.quant import Array, QSpec, Range, dequantize, qparams, quantize
from tests.calibrators.work import calls

INT8 = QSpec("int8", symmetric=True)
UINT8 = QSpec("uint8", symmetric=False)
SPECS = [INT8, UINT8, QSpec("int8", False), QSpec("uint8", True), QSpec("int8", True, narrow=True)]


def clipped(values: Array, spec: QSpec) -> tuple[float, float]:
    observer = Mse().observer(spec)
    observer.update(np.asarray(values, np.float32))
    return float(observer.range().lo), float(observer.range().hi)


def measured_error(values: Array, lo: float, hi: float, spec: QSpec) -> float:
    params = qparams(Range(np.array(lo), np.array(hi)), spec)
    rounded = dequantize(quantize(values, params), params)
    return float(np.square(rounded.astype(np.float64) - values).sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shrink", [1.0, 0.5, 0.1, 0.02])
def test_expected_error_is_that_of_real_quantization(spec: QSpec, shrink: float) -> None:
    values = np.random.default_rng(0).gumbel(size=100_000).astype(np.float32)
    observer = Mse().observer(spec)
    observer.update(values)
    lo, hi = float(values.min()) * shrink, float(values.max()) * shrink
    expected = expected_error(observer.histogram(), np.array([lo]), np.array([hi]), spec)
    # 100,000 samples and bins far below a step: within a few standard errors
    assert expected[0] == pytest.approx(measured_error(values, lo, hi, spec), rel=0.02)


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.sampled_from(SPECS))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_expected_error_is_the_integral(low: float, high: float, spec: QSpec) -> None:
    """A histogram that is really piecewise uniform, sampled densely, in bins wider than steps."""
    values = (np.arange(-256 * 64, 256 * 64) + 0.5) / (64 * 128)  # uniform on [-2, 2)
    observer = Mse(bins=256).observer(spec)
    observer.update(values)
    found = expected_error(observer.histogram(), np.array([-low]), np.array([high]), spec)
    expected = measured_error(values.astype(np.float32), -low, high, spec)
    # the sampling itself errs by about the spacing squared over the step squared
    assert found[0] == pytest.approx(expected, rel=0.05)


def test_gaussian_with_one_outlier_in_closed_form() -> None:
    # Clipping the outlier at t costs (A - t)^2, rounding n values costs n (t / 127)^2 / 12; the sum
    # is least at t = A / (1 + n / (12 * 127^2)), here well beyond the other values.
    n, outlier = 400_000, 40.0
    values = np.append(np.random.default_rng(0).standard_normal(n), outlier)
    best = outlier / (1 + n / (12 * 127**2))
    lo, hi = clipped(values, INT8)
    assert lo == np.float32(values.min())
    assert hi == pytest.approx(best, rel=0.02)


def test_asymmetric_ends_move_apart() -> None:
    n = 400_000
    values = np.append(np.random.default_rng(0).uniform(-1, 1, n), 40.0)
    lo, hi = clipped(values, UINT8)
    # as above with step (t + 1) / 255: d/dt (40 - t)^2 + n ((t + 1) / 255)^2 / 12 = 0
    rate = n / (12 * 255**2)
    assert hi == pytest.approx((40 - rate) / (1 + rate), rel=0.02)
    assert lo == pytest.approx(-1, abs=0.05)


def test_values_of_one_sign_are_clipped_at_the_far_end() -> None:
    n = 400_000
    values = np.append(np.random.default_rng(0).uniform(0.1, 1, n), 8.0)
    best = 8 / (1 + n / (12 * 255**2))
    for sign in (1, -1):
        far, near = sorted(clipped(sign * values, UINT8), key=abs, reverse=True)
        assert far == pytest.approx(sign * best, rel=0.02)
        assert near == sign * np.float32(np.abs(values).min())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", ["normal", "laplace", "gelu", "relu", "outlier", "negative"])
def test_no_grid_of_ranges_is_much_better(shape: str, spec: QSpec) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000).astype(np.float32)
    values = {
        "normal": x,
        "laplace": rng.laplace(size=20_000).astype(np.float32),
        "gelu": x / (1 + np.exp(-1.702 * x)),
        "relu": np.maximum(x, 0),
        "outlier": np.append(x, np.float32(-300)),
        "negative": -np.abs(x) - 1,
    }[shape].astype(np.float32)
    lo, hi = clipped(values, spec)
    found = measured_error(values, lo, hi, spec)
    least, most = float(values.min()), float(values.max())
    shrinks = np.linspace(1, 0.02, 25)
    others = [
        measured_error(values, least * a, max(most * b, least * a), spec)
        for a in shrinks
        for b in shrinks
        if not spec.symmetric or a == b
    ]
    assert found <= 1.03 * min(others)


def test_uniform_values_are_not_clipped() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    for spec in SPECS:
        lo, hi = clipped(values, spec)
        assert (lo, hi) == pytest.approx((-1, 1), abs=0.03)


@pytest.mark.parametrize(
    "drawn", [[0.0], [-0.0], [5.0], [-7.0], [1e-45, -1e-45], [5.0, 10.0], [-3e38, 3e38]]
)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_few_values_are_kept(drawn: list[float], spec: QSpec) -> None:
    values = np.array(drawn, np.float32)
    lo, hi = clipped(values, spec)
    assert measured_error(values, lo, hi, spec) <= measured_error(
        values, float(values.min()), float(values.max()), spec
    )
    assert values.min() <= lo <= hi <= values.max()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_of_equals_the_widest_is_taken(spec: QSpec) -> None:
    values = np.array([-1e-38, 3e-38], np.float32)  # too small for any scale
    assert clipped(values, spec) == (values[0], values[1])


def test_the_search_is_a_few_steps_over_whole_arrays() -> None:
    """927 calls as written; a loop over the 100,000 values or all 2,048 bins would show."""
    observer = Mse().observer(UINT8)
    observer.update(np.random.default_rng(0).standard_normal(100_000))
    assert calls(observer.range) < 2000
    assert calls(lambda: [abs(x) for x in range(2000)]) >= 2000
