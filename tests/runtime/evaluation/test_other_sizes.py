"""Runs at other sizes than those of the data: what is tried, and that a failure is seen."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.data.feeds import Feed
from qcompile.errors import ModelError
from qcompile.quant import Array
from qcompile.rewriting.testing import parse
from qcompile.runtime.evaluation.other_sizes import (
    check_runs,
    feeds_that_run,
    longer_text,
    longest_text,
    resized_feeds,
)


def test_open_dimensions_change_and_values_stay_values() -> None:
    graph = parse(
        "g (int64[B,S] ids, int64[B,S] mask, float[B,3] x) => (int64[B,S] y) { y = Add(ids, mask) }"
    )
    ids = np.arange(8).reshape(2, 4)
    feed: Feed = {"ids": ids, "mask": np.ones_like(ids), "x": np.zeros((2, 3), np.float32)}
    feeds = list(resized_feeds(graph, feed))
    shapes = [f["ids"].shape for f in feeds]
    assert shapes == [(1, 2), (3, 6), (1, 3), (1, 6)]
    assert all(f["ids"].shape == f["mask"].shape and f["x"].shape[1] == 3 for f in feeds)
    assert all({*f["ids"].ravel()} <= {*range(8)} and f["mask"].all() for f in feeds)
    assert all(len(f["x"]) == len(f["ids"]) for f in feeds)


def test_sizes_that_contradict_a_shared_name_change_apart() -> None:
    graph = parse("g (float[N,N] x) => (float[N,N] y) { y = Neg(x) }")
    shapes = [f["x"].shape for f in resized_feeds(graph, {"x": np.zeros((2, 8), np.float32)})]
    assert shapes == [(1, 4), (3, 11), (1, 7), (1, 11)]


def test_nothing_is_open() -> None:
    graph = parse("g (float[2,3] x) => (float[2,3] y) { y = Neg(x) }")
    assert list(resized_feeds(graph, {"x": np.zeros((2, 3), np.float32)})) == []


def _takes_at_most_four(feed: Feed) -> dict[str, Array]:
    if feed["x"].shape[0] > 4:
        raise ModelError("too long")
    return dict(feed)


def test_a_model_that_fails_where_the_other_runs_is_seen() -> None:
    feeds: list[Feed] = [{"x": np.zeros(n)} for n in (2, 4, 8)]
    assert feeds_that_run(_takes_at_most_four, feeds) == feeds[:2]
    check_runs(_takes_at_most_four, feeds[:2])
    with pytest.raises(ModelError, match=r"does not run on x \[8\], .*--dim NAME=N.*too long"):
        check_runs(_takes_at_most_four, feeds)


def test_text_becomes_longer_and_positions_go_on_counting() -> None:
    """The length of the past stays, and that of the mask is still the sum of both."""
    graph = parse(
        """g (int64[B,S] ids, int64[B,S] places, int64[B,"past + S"] mask, float[B,2,past,4] key)
           => (int64[B,S] y) { y = Add(ids, places) }""".replace('"past + S"', "M")
    )
    dims = {t.name: t for t in graph.inputs}
    dims["mask"].shape = ["B", "past + S"]
    feed: Feed = {
        "ids": np.array([[7, 8, 3]]),
        "places": np.array([[2, 3, 4]]),
        "mask": np.ones((1, 5), np.int64),
        "key": np.zeros((1, 2, 2, 4), np.float32),
    }
    assert longest_text(graph, feed) == 3
    made = longer_text(graph, feed, 7)
    assert made["ids"].tolist() == [[7, 8, 3, 7, 8, 3, 7]]
    assert made["places"].tolist() == [[2, 3, 4, 5, 6, 7, 8]]
    assert made["mask"].shape == (1, 9) and made["key"].shape == (1, 2, 2, 4)


def test_what_is_no_text_of_open_length() -> None:
    image = parse("g (float[B,3,H,W] x) => (float[B,3,H,W] y) { y = Neg(x) }")
    assert longest_text(image, {"x": np.zeros((1, 3, 4, 4), np.float32)}) == 0
    fixed = parse("g (int64[B,8] x) => (int64[B,8] y) { y = Neg(x) }")
    assert longest_text(fixed, {"x": np.zeros((1, 8), np.int64)}) == 0
