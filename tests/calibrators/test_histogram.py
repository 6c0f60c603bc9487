"""The shared histogram: exact bins, independent of batches, for any magnitudes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibrators._histogram import Bins, HistogramObserver
from qcompile.calibrators.percentile import Percentile
from qcompile.quant import Array, QSpec

TENSOR = QSpec("uint8", symmetric=False)
CHANNEL = QSpec("uint8", symmetric=False, granularity="channel", axis=-1)
QUIET = settings(deadline=None, derandomize=True, max_examples=50)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def observed(values: Array, bins: int = 256, spec: QSpec = TENSOR) -> HistogramObserver:
    observer = Percentile(bins=bins).observer(spec)
    observer.update(values)
    return observer


def by_hand(values: list[float], bins: Bins) -> list[int]:
    """Counts in exact rational arithmetic on the grid of ``bins``."""
    counts = [0] * bins.counts.size
    for x in values:
        counts[Fraction(x) // Fraction(2) ** bins.exponent - bins.first] += 1
    return counts


@given(st.lists(FINITE, min_size=1, max_size=30))
@QUIET
def test_counts_are_exact(values: list[float]) -> None:
    bins = observed(np.array(values, np.float32)).histogram()
    assert bins.counts.tolist() == by_hand(values, bins)
    assert 1 <= bins.counts.size <= 256
    assert (bins.lo, bins.hi) == (min(values), max(values))
    assert bins.edges[0] <= bins.lo < bins.edges[1]
    assert bins.edges[-2] <= bins.hi < bins.edges[-1]


@given(st.lists(st.lists(FINITE, min_size=1, max_size=5), min_size=1, max_size=8), st.data())
@QUIET
def test_growing_and_merging_give_the_final_grid(
    drawn: list[list[float]], data: st.DataObject
) -> None:
    batches = [np.array(b, np.float32) for b in drawn]
    whole = observed(np.concatenate(batches)).histogram()
    cut = data.draw(st.integers(0, len(batches) - 1))
    total, later = Percentile(bins=256).observer(TENSOR), Percentile(bins=256).observer(TENSOR)
    for i, batch in enumerate(batches):
        (total if i < cut else later).update(batch)
    total.merge(later)
    found = total.histogram()
    assert (found.exponent, found.first) == (whole.exponent, whole.first)
    assert found.counts.tolist() == whole.counts.tolist()


@given(st.floats(2.0**-100, 2.0**100, width=32), st.floats(0, 1))
@QUIET
def test_resolution_is_at_least_half_of_what_memory_allows(span: float, where: float) -> None:
    values = np.array([-span * where, span * (1 - where)], np.float32)
    bins = observed(values).histogram()
    assert bins.counts.size >= 128


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [-0.0, 0.0],
        [5.0] * 3,
        [-5.0],
        [1e-45, -1e-45],
        [2.0**-126, 2.0**-149],
        [-3.4028235e38, 3.4028235e38],
        [-3.4028235e38, -1e-45, 0.0, 1e-45],
        [1000.0, 1000.0001],
        [65536.0, 65536.0 + 1 / 128],
    ],
)
def test_edge_cases(values: list[float]) -> None:
    values = np.array(values, np.float32).tolist()
    observer = observed(np.array(values, np.float32), bins=8192)
    assert observer.histogram().counts.tolist() == by_hand(values, observer.histogram())
    assert observer.counts.nbytes == 8192 * 8


def test_a_tiny_range_then_a_huge_one() -> None:
    observer = observed(np.array([1e-45, -1e-45], np.float32))
    observer.update(np.array([-3e38], np.float32))
    bins = observer.histogram()
    assert bins.counts[[0, -2, -1]].tolist() == [1, 1, 1]  # -1e-45 stays below 0
    assert bins.first + bins.counts.size == 1


def test_many_values_in_steps_equal_numpy() -> None:
    values = np.random.default_rng(0).standard_normal(200_001).astype(np.float32)
    bins = observed(values, bins=8192).histogram()
    expected, _ = np.histogram(values.astype(np.float64), bins.edges)
    assert bins.counts.tolist() == expected.tolist()


def test_channels_have_grids_of_their_own_and_an_eighth_of_the_bins() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((1000, 3)) * [1e-6, 1, 1e6]).astype(np.float32)
    observer = observed(values, bins=8192, spec=CHANNEL)
    assert observer.counts.shape == (3, 1024)
    for c in range(3):
        bins = observer.histogram(c)
        assert bins.counts.tolist() == by_hand(values[:, c].tolist(), bins)
        assert bins.counts.size >= 512


@pytest.mark.parametrize("bins", [0, 128, 1000, 2**21, -256])
def test_bins_are_checked(bins: int) -> None:
    with pytest.raises(ValueError, match=f"found {bins} bins, expected a power of two"):
        Percentile(bins=bins)
