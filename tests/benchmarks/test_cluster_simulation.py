"""The simulation of many workers, where its result is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cluster_simulation import Costs, Network, simulate, table

# 100 shards of one second each; all else is free.
FREE = Costs(1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1e6)
FAST = Network(1e18, 1e18)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 100), (2, 50), (100, 1), (1000, 1)])
def test_what_costs_nothing_limits_nothing(workers: int, seconds: float) -> None:
    found = simulate(FREE, FAST, 100, workers)
    assert found.seconds == pytest.approx(seconds)
    assert found.limit == "workers" or workers > 100


def test_a_client_that_is_busy_is_the_limit() -> None:
    found = simulate(replace(FREE, prepare=0.25, merge=0.25), FAST, 100, 64)
    assert found.seconds == pytest.approx(100 * 0.5, rel=0.05)
    assert found.limit == "client" and found.client > 0.95


def test_workers_that_merge_help_the_client() -> None:
    costs = replace(FREE, merge=0.25)
    alone, grouped = (simulate(costs, FAST, 1000, 64, group=g) for g in (1, 16))
    assert alone.seconds == pytest.approx(250, rel=0.05) and alone.limit == "client"
    assert grouped.seconds == pytest.approx(1000 * 1.5 / 64, rel=0.2) and grouped.limit == "workers"


def test_so_is_its_network() -> None:
    found = simulate(replace(FREE, ranges=1e9), Network(1e9, 1e18), 100, 64)
    assert found.seconds == pytest.approx(101, rel=0.02) and found.limit == "network"


def test_and_the_storage_of_the_model() -> None:
    found = simulate(replace(FREE, model=1e9), Network(1e18, 1e9), 100, 64)
    assert found.loading == 64 and found.limit == "loading the model"


def test_shards_send_their_part_of_the_samples() -> None:
    """Of 1,024 rows 10.24 are expected in each of 100 shards, and 30 are sent."""
    found = simulate(replace(FREE, sample=1e9), Network(1e9, 1e18), 100, 64)
    assert found.network * found.seconds == pytest.approx(100 * 30 / 1024)


def test_a_larger_encoder() -> None:
    larger = replace(FREE, model=4, ranges=1, sample=2).of_larger(8e6)
    assert (larger.observe, larger.model) == (8, 32)
    assert larger.ranges == pytest.approx(4) and larger.sample == pytest.approx(8)


def test_the_table() -> None:
    assert "| 2 | 50 | 2.0 | 100% | 0% | 0% | workers |" in table(FREE, FAST, 100, [1, 2])
