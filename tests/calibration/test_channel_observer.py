"""The sketch of a tensor's channels: extrema over all data, a sample that no split changes."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.calibration.channel_observer import ChannelObserver
from qcompile.quant import Array, ChannelStats


def rows(n: int, channels: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(n, channels)).astype(np.float32)


def seen(parts: list[Array], limit: int = 16) -> ChannelObserver:
    observer = ChannelObserver(limit)
    for part in parts:
        observer.update(part)
    return observer


def test_extrema_cover_every_row() -> None:
    data = rows(100, 5)
    stats = seen([data[:30], data[30:]]).stats()
    np.testing.assert_array_equal(stats.lo, data.min(0))
    np.testing.assert_array_equal(stats.hi, data.max(0))
    np.testing.assert_array_equal(stats.width, np.abs(data).max(0))


@pytest.mark.parametrize("cut", [1, 16, 50, 99])
def test_the_sample_does_not_depend_on_the_split(cut: int) -> None:
    data = rows(100, 70)
    whole, left, right = seen([data]), seen([data[:cut]]), seen([data[cut:]])
    left.merge(right)
    np.testing.assert_array_equal(left.stats().rows, whole.stats().rows)
    assert len(whole.stats().rows) == 16


def test_what_was_asked_for_in_between_does_not_change_later() -> None:
    data = rows(400, 5)
    observer = seen([data[:100]])
    early, state = observer.stats(), observer.state()
    held = early.rows.copy(), state["keys"].copy()
    for start in range(100, 400, 50):
        observer.update(data[start : start + 50])
    np.testing.assert_array_equal(early.rows, held[0])
    np.testing.assert_array_equal(state["keys"], held[1])
    np.testing.assert_array_equal(observer.stats().rows, seen([data]).stats().rows)


def test_rows_kept_elsewhere_are_the_same() -> None:
    data = rows(400, 5)
    away = ChannelObserver(16, keep=lambda a: np.require(a.copy(), requirements="C"))
    for start in range(0, 400, 50):
        away.update(data[start : start + 50])
    np.testing.assert_array_equal(away.stats().rows, seen([data]).stats().rows)


def test_a_restored_sketch_goes_on_where_the_other_was() -> None:
    data = rows(100, 5)
    whole, first, resumed = seen([data]), seen([data[:40]]), ChannelObserver(16)
    resumed.restore(ChannelObserver(16).state())  # nothing seen yet
    resumed.restore(first.state())
    resumed.update(data[40:])
    for name, values in whole.state().items():
        np.testing.assert_array_equal(resumed.state()[name], values)
    state = first.state()
    for name, wrong in (("keys", state["keys"][1:]), ("lo", state["lo"][1:])):
        with pytest.raises(ValueError, match="a sketch of"):
            ChannelObserver(16).restore({**state, name: wrong})
    with pytest.raises(KeyError):
        ChannelObserver(16).restore({"lo": state["lo"]})


def test_the_sample_is_spread_over_the_data() -> None:
    data = rows(1000, 8)
    data[:, 0] = np.arange(1000)
    kept = seen([data], limit=200).stats().rows[:, 0]
    assert 350 < kept.mean() < 650  # 500 with a standard error of 20


def test_nothing_seen_is_no_statistic() -> None:
    with pytest.raises(ValueError, match="no values"):
        seen([rows(0, 3)]).stats()


def test_scaled_and_permuted_follow_the_channels() -> None:
    stats = seen([rows(40, 3)]).stats()
    factor, order = np.array([1.0, 2.0, 0.5]), np.array([2, 0, 1])
    np.testing.assert_array_equal(stats.scaled(factor).rows, stats.rows * factor)
    np.testing.assert_array_equal(stats.permuted(order).hi, stats.hi[order])


# Tails ----------------------------------------------------------------------------------------


def of(data: Array) -> ChannelStats:
    return ChannelStats(data.min(0), data.max(0), data)


def test_a_channel_that_hardly_moves_has_hardly_a_tail() -> None:
    """Its own estimate is 0, half of the bound that is common to all remains; alone, nothing."""
    data = rows(1000, 9)
    data[:, 0] = 50
    stats = of(data)
    assert stats.tail[0] == pytest.approx(stats.tail.max() / 2)
    assert stats.tail[0] < 0.05  # the maximum of 16 times the data: 15 % above
    assert of(np.full((100, 3), 7, np.float32)).tail.tolist() == [0, 0, 0]
    assert of(np.zeros((100, 3), np.float32)).tail.tolist() == [0, 0, 0]


@pytest.mark.parametrize("exponent", [0.1, 0.25, 0.5])
def test_a_pareto_tail_is_found(exponent: float) -> None:
    """u ** -a: the maximum of n grows as n ** a. Eight logarithms a channel, each with a standard
    deviation of a: the mean of 400 channels is within 4 a / sqrt(8 * 400) = 7 %. The estimate of a
    channel is cut at that mean, so it is below it by 1/2 · E max(0, own - mean) < 0.1 a."""
    uniform = np.random.default_rng(0).uniform(size=(2000, 400))
    stats = of((uniform**-exponent).astype(np.float32))
    assert stats.tail.mean() == pytest.approx(exponent, rel=0.17)
    assert stats.tail.max() <= exponent * 1.07


def test_the_extrapolated_maximum_is_that_of_more_data() -> None:
    """A sample of a sixteenth: the maximum of 16 times the data is foretold on average."""
    uniform = np.random.default_rng(0).uniform(size=(16 * 500, 200))
    data = (uniform**-0.3).astype(np.float32)
    extrapolated, later = of(data[:500]).extrapolated(4), of(data)
    assert np.median(extrapolated.hi) == pytest.approx(np.median(later.hi), rel=0.2)


def test_normal_data_is_extrapolated_a_little() -> None:
    """Normal maxima grow as sqrt(2 log n): from 1000 to 16000 by a fifth."""
    stats = of(rows(1000, 50))
    growth = stats.extrapolated(4).hi / stats.hi
    assert 1.05 < growth.mean() < 1.6


def test_extrapolation_moves_ends_outwards_and_keeps_the_sample() -> None:
    stats = of(rows(200, 5))
    assert np.array_equal(stats.extrapolated(0).hi, stats.hi)
    ahead = stats.extrapolated(3)
    np.testing.assert_allclose(ahead.hi / stats.hi, 2.0 ** (3 * stats.tail), rtol=1e-6)
    np.testing.assert_allclose(ahead.lo / stats.lo, 2.0 ** (3 * stats.tail), rtol=1e-6)
    assert ahead.rows is stats.rows


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_rows_have_no_tail(count: int) -> None:
    stats = ChannelStats(-np.ones(3), np.ones(3), rows(count, 3))
    assert stats.tail.tolist() == [0, 0, 0]
    assert np.array_equal(stats.extrapolated(4).hi, stats.hi)


def test_the_largest_values_alone_make_the_tail() -> None:
    """Order and sign do not matter, nor does what is small."""
    data = rows(400, 6)
    stats = of(data)
    np.testing.assert_allclose(of(-data[::-1]).tail, stats.tail)
    cut = np.sort(np.abs(data), axis=0)
    cut[:200] = 0
    np.testing.assert_allclose(of(cut).tail, stats.tail)
    np.testing.assert_allclose(stats.scaled(np.full(6, 8, np.float32)).tail, stats.tail)


def test_the_tail_of_permuted_channels_is_permuted() -> None:
    stats, order = of(rows(100, 4)), np.array([3, 1, 0, 2])
    np.testing.assert_allclose(stats.permuted(order).tail, stats.tail[order])
    np.testing.assert_array_equal(stats.permuted(order).rows, stats.rows[:, order])
    back = stats.permuted(order).permuted(np.argsort(order))
    np.testing.assert_array_equal(back.lo, stats.lo)


# Background: text in addition to the data ------------------------------------------------------


def test_background_extrema_count_in_the_extrapolation_only() -> None:
    data, text = rows(50, 4), rows(20, 4, seed=1) * 10
    observer = seen([data])
    observer.update_background(text)
    stats = observer.stats()
    np.testing.assert_array_equal(stats.hi, data.max(0))
    np.testing.assert_array_equal(stats.rows, seen([data]).stats().rows)
    np.testing.assert_array_equal(stats.tail, seen([data]).stats().tail)
    np.testing.assert_array_equal(stats.extrapolated(0).hi, np.maximum(data.max(0), text.max(0)))
    np.testing.assert_array_equal(stats.extrapolated(0).lo, np.minimum(data.min(0), text.min(0)))


def test_next_to_narrower_background_tails_extrapolate_half_of_the_doublings() -> None:
    data = rows(200, 6)
    observer = seen([data], limit=1000)
    observer.update_background(data / 8)
    np.testing.assert_array_equal(observer.stats().extrapolated(4).hi, of(data).extrapolated(2).hi)


def test_background_extrema_of_merged_observers_are_those_of_one() -> None:
    parts = [rows(9, 3, seed) for seed in range(3)]
    whole, left, right = seen([rows(5, 3)]), seen([rows(5, 3)]), ChannelObserver()
    for part in parts:
        whole.update_background(part)
    left.update_background(parts[0])
    right.update_background(parts[1])
    right.update_background(parts[2])
    left.merge(right)
    assert (
        whole.stats().background_extrema is not None and left.stats().background_extrema is not None
    )
    np.testing.assert_array_equal(left.stats().background_extrema, whole.stats().background_extrema)


def test_background_extrema_follow_the_channels_and_ignore_what_is_not_finite() -> None:
    observer, factor = seen([rows(40, 3)]), np.array([1, 2, 0.5], np.float32)
    observer.update_background(np.full((2, 3), np.inf, np.float32))
    assert observer.stats().background_extrema is None
    observer.update_background(np.array([[1, 20, 300]], np.float32))
    stats, order = observer.stats(), np.array([2, 0, 1])
    assert stats.scaled(factor).extrapolated(0).hi.tolist()[1:] == [40, 150]
    assert stats.permuted(order).extrapolated(0).hi.tolist()[::2] == [300, 20]
