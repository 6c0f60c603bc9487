"""Drawn rows: uniform, a function of the seed, and the same however the stream is split."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.data.streams.row_draw import draw_rows


def drawn(count: int, size: int, seed: int) -> list[int]:
    return [int(row) for row in draw_rows(np.arange(count), size, seed)]


def test_a_sample_stays_the_same_in_later_versions() -> None:
    assert drawn(1000, 5, 0) == [160, 190, 330, 856, 985]
    assert drawn(1000, 5, 1) != drawn(1000, 5, 0)


def test_a_short_stream_is_taken_whole() -> None:
    assert drawn(3, 5, 0) == [0, 1, 2] == drawn(3, 3, 0)
    assert drawn(0, 5, 0) == []


def test_every_row_is_drawn_as_often() -> None:
    """1000 seeds draw 10 of 50 rows: each about 200 times. 5 standard deviations of a binomial
    number, sqrt(1000 · 0.2 · 0.8) = 12.6, are exceeded by none of 50 rows in 99.997 % of cases."""
    counts = np.zeros(50, int)
    for seed in range(1000):
        counts[drawn(50, 10, seed)] += 1
    assert np.abs(counts - 200).max() < 64
    pairs = sum(np.diff(drawn(50, 10, seed)).min() == 1 for seed in range(1000))
    # Of 10 of 50 rows no two are neighbours with probability C(41, 10) / C(50, 10) = 0.109.
    assert 832 < pairs < 950  # 891, 6 standard deviations


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 300), max_size=5),
)
def test_samples_of_shards_merge(count: int, size: int, seed: int, cuts: list[int]) -> None:
    shards = np.split(np.arange(count), sorted(min(cut, count) for cut in cuts))
    samples = [draw_rows(shard, size, seed) for shard in shards][::-1]
    merged = draw_rows(np.concatenate(samples), size, seed)
    assert merged.tolist() == drawn(count, size, seed)


def test_merging_in_a_tree_gives_the_same() -> None:
    parts = [draw_rows(np.arange(i, i + 100), 30, 4) for i in range(0, 800, 100)]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [draw_rows(np.concatenate(pair), 30, 4) for pair in pairs]
    assert parts[0].tolist() == drawn(800, 30, 4)
