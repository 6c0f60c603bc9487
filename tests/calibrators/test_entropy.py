"""Entropy: the vectorised divergence against its definition, and what it does to distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibrators._histogram import Bins
from qcompile.calibrators.entropy import Entropy, _magnitudes, divergences
from qcompile.quant import Array, QSpec
from tests.calibrators.work import calls

INT8 = QSpec("int8", symmetric=True)
UINT8 = QSpec("uint8", symmetric=False)


def clipped(values: Array, spec: QSpec = INT8) -> tuple[float, float]:
    observer = Entropy().observer(spec)
    observer.update(np.asarray(values, np.float32))
    return float(observer.range().lo), float(observer.range().hi)


def divergence(counts: Array, levels: int, cut: int) -> float:
    """KL(P || Q) by its definition, one bin after the other."""
    inside = counts[:cut].astype(float)
    if inside.sum() == 0:
        return float("inf")
    p = inside.copy()
    p[-1] += counts[cut:].sum()
    q = np.zeros(cut)
    for level in range(levels):
        group = slice(level * cut // levels, (level + 1) * cut // levels)
        taken = p[group] > 0
        q[group] = np.where(taken, max(inside[group].sum(), 1e-4) / max(taken.sum(), 1), 0)
    p, q, there = p / counts.sum(), q / inside.sum(), p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


@given(
    st.lists(st.integers(0, 50), min_size=8, max_size=40).filter(any),
    st.integers(1, 8),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_divergences_follow_the_definition(drawn: list[int], levels: int) -> None:
    counts = np.array(drawn, np.int64)
    cuts = np.arange(levels, counts.size + 1)
    expected = [divergence(counts, levels, int(cut)) for cut in cuts]
    np.testing.assert_allclose(divergences(counts, levels, cuts), expected, rtol=1e-9, atol=1e-12)


def test_divergence_in_closed_form() -> None:
    # kept whole: Q spreads 4 and 8 evenly over pairs of bins
    counts = np.array([1, 3, 4, 4], np.int64)
    whole = (1 * np.log(1 / 2) + 3 * np.log(3 / 2)) / 12
    # cut at 2: P = (1, 11) / 12 and Q = (1, 3) / 4
    cut = np.log(1 / 3) / 12 + 11 * np.log((11 / 12) / (3 / 4)) / 12
    found = divergences(counts, 2, np.array([4, 2]))
    np.testing.assert_allclose(found, [whole, cut], rtol=1e-12)


def test_an_outlier_is_clipped_and_the_bulk_kept() -> None:
    values = np.random.default_rng(0).standard_normal(200_000)
    lo, hi = clipped(np.append(values, 60.0))
    assert 3 < -lo <= -float(values.min())
    assert 3 < hi < 10


def test_uniform_values_are_not_clipped() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32)
    assert clipped(values) == (values.min(), values.max())


def test_threshold_is_symmetric_and_cut_to_the_values() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(200_000), [-60.0, 60.0]])
    lo, hi = clipped(values, UINT8)
    assert lo == -hi
    lo, _ = clipped(np.abs(values), UINT8)
    assert lo == np.float32(np.abs(values).min())


def test_mirrored_values_give_the_mirrored_range() -> None:
    values = np.random.default_rng(0).exponential(size=50_000).astype(np.float32)
    lo, hi = clipped(values, UINT8)
    assert hi < values.max()
    assert clipped(-values, UINT8) == (-hi, -lo)


def test_magnitudes_join_both_signs() -> None:
    # 257 bins of width 1; -1 lies on the border that it shares with (-1, 0), hence bin 0 again
    bins = Bins(np.arange(1, 258), first=-128, exponent=0, lo=-128.0, hi=128.0)
    counts, width = _magnitudes(bins)
    assert width == 1.0
    assert counts.tolist() == [2 * 129 - 1] * 128 + [257]


def test_wide_magnitudes_are_joined_down_to_2048() -> None:
    bins = Bins(np.ones(4, np.int64), first=8190, exponent=3, lo=8 * 8190.0, hi=8 * 8193.5)
    counts, width = _magnitudes(bins)
    assert (width, counts.size) == (64.0, 1025)
    assert counts[-2:].tolist() == [2, 2]


def test_one_sided_values_use_all_integers_of_an_asymmetric_type() -> None:
    # twice the integers, so the smallest threshold on offer is twice as large
    values = np.append(np.abs(np.random.default_rng(0).standard_normal(200_000)), 60.0)
    assert clipped(values, UINT8)[1] > 1.5 * clipped(values, INT8)[1]


def test_16_bits_clip_nothing() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(10_000), 60.0).astype(np.float32)
    span = clipped(values, QSpec("int16", symmetric=True))
    assert span == (values.min(), values.max())


@pytest.mark.parametrize("drawn", [[0.0], [5.0, 5.0], [-7.0], [1e-45, -1e-45], [5.0, 10.0]])
@pytest.mark.parametrize("spec", [INT8, UINT8], ids=str)
def test_few_values_are_kept(drawn: list[float], spec: QSpec) -> None:
    values = np.array(drawn, np.float32)
    assert clipped(values, spec) == (values.min(), values.max())


def test_the_search_is_a_few_steps_over_whole_arrays() -> None:
    """90 calls as written; a loop over the 100,000 values or all 2,048 bins would show."""
    observer = Entropy().observer(UINT8)
    observer.update(np.random.default_rng(0).standard_normal(100_000))
    assert calls(observer.range) < 200
    assert calls(lambda: [abs(x) for x in range(200)]) >= 200
