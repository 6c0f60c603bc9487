"""Moving average: equal to the recurrence it stands for, whole or merged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibrators.moving_average import MovingAverage
from qcompile.quant import Array, Observer, QSpec

TENSOR = QSpec("uint8", symmetric=False)


def recurrence(batches: list[Array], momentum: float) -> tuple[float, float]:
    """A_1 = x_1, A_i = c A_(i-1) + (1 - c) x_i, for minimum and maximum."""
    lo, hi = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        lo = momentum * lo + (1 - momentum) * float(batch.min())
        hi = momentum * hi + (1 - momentum) * float(batch.max())
    return lo, hi


def ends(observer: Observer) -> tuple[float, float]:
    return float(observer.range().lo), float(observer.range().hi)


def test_two_batches_by_hand() -> None:
    observer = MovingAverage(0.75).observer(TENSOR)
    observer.update(np.array([0.0, 8.0]))
    assert ends(observer) == (0.0, 8.0)
    observer.update(np.array([-4.0, 16.0, 1.0]))
    assert ends(observer) == (-1.0, 10.0)


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), min_size=1),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_equals_the_recurrence(drawn: list[list[float]], momentum: float) -> None:
    batches = [np.array(b, np.float32) for b in drawn]
    observer = MovingAverage(momentum).observer(TENSOR)
    for batch in batches:
        observer.update(batch)
    # the result is float32: half a unit in the last place of 100
    np.testing.assert_allclose(ends(observer), recurrence(batches, momentum), rtol=0, atol=4e-6)


def test_merging_a_thousand_parts_equals_the_recurrence() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal(3).astype(np.float32) for _ in range(1000)]
    total = MovingAverage().observer(TENSOR)
    for start in range(0, 1000, 7):
        part = MovingAverage().observer(TENSOR)
        for batch in batches[start : start + 7]:
            part.update(batch)
        total.merge(part)
    lo, hi = recurrence(batches, 0.9)
    assert ends(total) == (float(np.float32(lo)), float(np.float32(hi)))
    assert total.batches == 1000


def test_order_matters() -> None:
    early, late = MovingAverage().observer(TENSOR), MovingAverage().observer(TENSOR)
    early.update(np.array([0.0, 1.0]))
    late.update(np.array([0.0, 2.0]))
    late.merge(early)
    assert late.range().hi == np.float32(1.9)


def test_a_constant_stays_exact_and_a_late_value_counts() -> None:
    observer = MovingAverage().observer(TENSOR)
    for _ in range(5000):  # the weight of the first batch underflows
        observer.update(np.array([0.1], np.float32))
    assert observer.range().lo == observer.range().hi == np.float32(0.1)
    observer.update(np.array([1.1], np.float32))
    assert observer.range().hi == np.float32(0.2)


def test_an_empty_batch_is_not_a_batch() -> None:
    observer = MovingAverage().observer(TENSOR)
    observer.update(np.array([4.0]))
    observer.update(np.empty((0, 3)))
    assert observer.batches == 1


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_is_checked(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"found momentum .*, expected a number in \[0, 1\)"):
        MovingAverage(momentum)
