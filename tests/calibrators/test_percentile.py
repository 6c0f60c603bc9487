"""Percentile: both tails, against sorted values and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibrators.percentile import Percentile
from qcompile.quant import Array, QSpec

TENSOR = QSpec("uint8", symmetric=False)


def clipped(values: Array, percentile: float, bins: int = 8192) -> tuple[float, float]:
    observer = Percentile(percentile, bins).observer(TENSOR)
    observer.update(np.asarray(values, np.float32))
    return float(observer.range().lo), float(observer.range().hi)


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9])
def test_uniform_grid(percentile: float) -> None:
    values = np.arange(-3000, 5001) / 1000  # uniform on [-3, 5]
    tail = 8 * (100 - percentile) / 200
    # at most 8192 bins over 8 units: width 1/512 or 1/1024; and steps of 1/1000
    assert clipped(values, percentile) == pytest.approx((-3 + tail, 5 - tail), abs=3e-3)


def test_both_tails_are_cut() -> None:
    values = np.concatenate([np.linspace(-1, 1, 9998), [-100.0], [90.0]])
    lo, hi = clipped(values, 99.98)  # one value from each tail
    width = 256 / 8192
    assert -1 - width <= lo <= -1 + width
    assert 1 - width <= hi <= 1 + width


def test_one_sided_values_lose_half_of_the_rest_on_each_side() -> None:
    values = np.linspace(0, 1, 10_001)
    assert clipped(values, 99.0) == pytest.approx((0.005, 0.995), abs=1e-3)


def test_hundred_percent_is_minmax() -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    assert clipped(values, 100.0) == (values.min(), values.max())


@pytest.mark.parametrize("value", [0.0, 7.0, -0.3, 1e-44])
def test_a_constant_is_its_own_range(value: float) -> None:
    values = np.full(10, value, np.float32)
    assert clipped(values, 99.99) == (values[0], values[0])


def test_few_values_are_not_clipped_away() -> None:
    # a tail of 0.0005 values takes less than a thousandth of the outermost bin
    lo, hi = clipped(np.array([-2.0, 0.0, 1.0, 2.0, 10.0]), 99.98)
    assert (lo, hi) == pytest.approx((-2.0, 10.0), abs=16 / 8192)


def test_a_spike_may_be_the_percentile() -> None:
    values = np.concatenate([np.zeros(9999), [8.0]])
    assert clipped(values, 99.9) == pytest.approx((0.0, 0.0), abs=8 / 2048)


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60),
    st.sampled_from([51.0, 75.0, 90.0, 99.0, 99.99]),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_within_one_bin_of_the_sorted_values(drawn: list[float], percentile: float) -> None:
    values = np.array(drawn, np.float32)
    observer = Percentile(percentile, 1024).observer(TENSOR)
    observer.update(values)
    width = observer.histogram().width
    span, tail = observer.range(), len(values) * (100 - percentile) / 200
    assert (values < span.lo - width).sum() <= tail + 1e-6
    assert (values <= span.lo + width).sum() >= tail - 1e-6
    assert (values > span.hi + width).sum() <= tail + 1e-6
    assert (values >= span.hi - width).sum() >= tail - 1e-6


@pytest.mark.parametrize("percentile", [50.0, 100.5, -1.0, float("nan")])
def test_percentile_is_checked(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"found percentile .*, expected one in \(50, 100\]"):
        Percentile(percentile)
