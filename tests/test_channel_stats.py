"""The sketch of a tensor's channels: extrema over all data, a sample that no split changes."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.channel_stats import ChannelObserver
from qcompile.qtypes import Array


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
