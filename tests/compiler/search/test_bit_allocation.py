"""Bits are allocated within the limit, to the weights that need them most."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from qcompile.compiler.search.bit_allocation import (
    Choice,
    allocate,
    fewest_bytes,
    interpolated_drops,
    packed_bytes,
)
from qcompile.quant import QSpec

WIDTHS = (8, 6, 5, 4, 3, 2)


def random_weights(seed: int, count: int, largest: int = 400) -> list[list[Choice]]:
    rng = np.random.default_rng(seed)
    weights = []
    for _ in range(count):
        size, drop = int(rng.integers(8, largest)), 10 ** rng.uniform(-4, 0)
        drops = interpolated_drops({4: drop, 2: drop * rng.uniform(4, 40)}, WIDTHS)
        weights.append([Choice(b, size * b, drops[b]) for b in WIDTHS])
    return weights


def total(found: list[Choice] | None) -> tuple[int, float]:
    assert found is not None
    return sum(c.bytes for c in found), sum(c.drop for c in found)


@pytest.mark.parametrize("seed", range(10))
def test_it_is_the_best_of_all_combinations(seed: int) -> None:
    weights = random_weights(seed, 4)
    low = fewest_bytes(weights)
    limit = int(low + (2.5 * low - low) * np.random.default_rng(seed).uniform())
    combinations = (list(c) for c in product(*weights))
    best = min(total(c)[1] for c in combinations if total(c)[0] <= limit)
    size, drop = total(allocate(weights, limit))
    assert size <= limit
    assert drop == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("largest", [400, 10_000_000])
def test_never_over_the_limit_and_never_worse_with_more_room(largest: int) -> None:
    weights = random_weights(0, 30, largest)
    low, high = fewest_bytes(weights), sum(w[0].bytes for w in weights)
    drops = []
    for limit in np.linspace(low, high, 25).astype(int):
        size, drop = total(allocate(weights, int(limit)))
        assert size <= limit
        drops.append(drop)
    assert drops == sorted(drops, reverse=True) and drops[0] > drops[-1]


def test_a_limit_below_the_fewest_bytes() -> None:
    weights = random_weights(1, 5)
    assert allocate(weights, fewest_bytes(weights) - 1) is None
    assert {c.bits for c in allocate(weights, fewest_bytes(weights)) or ()} == {2}


def test_what_costs_nothing_takes_the_fewest_bytes() -> None:
    free = [[Choice(b, 10 * b, 0.0) for b in WIDTHS]] * 3
    assert {c.bits for c in allocate(free, 10_000) or ()} == {2}


def test_a_sensitive_weight_gets_more_bits() -> None:
    drops = [interpolated_drops({4: 1e-3 * scale}, WIDTHS) for scale in (1, 1, 300, 1)]
    weights = [[Choice(b, 100 * b, d[b]) for b in WIDTHS] for d in drops]
    found = [c.bits for c in allocate(weights, 4 * 100 * 4) or ()]
    assert found[2] > 4 and max(found[:2] + found[3:]) < found[2]


def test_a_single_choice_is_kept() -> None:
    found = allocate([[Choice(16, 500, 0.0)], [Choice(8, 80, 0.1), Choice(4, 40, 0.2)]], 560)
    assert [c.bits for c in found or ()] == [16, 4]


def test_drops_follow_the_law_and_what_is_measured() -> None:
    found = interpolated_drops({4: 0.016}, WIDTHS)
    assert found[6] == pytest.approx(0.001) and found[3] == pytest.approx(0.064)
    found = interpolated_drops({4: 0.01, 2: 0.25}, WIDTHS)
    assert found[3] == pytest.approx(0.05) and found[2] == 0.25
    noisy = interpolated_drops({8: 0.002, 4: 0.001, 2: -0.1}, WIDTHS)
    assert list(noisy.values()) == sorted(noisy.values()) and min(noisy.values()) >= 0


def test_bytes_of_a_weight() -> None:
    plain = QSpec("int8", symmetric=True, granularity="channel", axis=1)
    assert packed_bytes(1001, plain, 8) == 1001
    four = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4)
    assert packed_bytes(1001, four, 4) == 501
    blocks = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4, block=32)
    assert packed_bytes(1001, four, 8) == 1001  # a target that has no type of so few bits
    assert packed_bytes(3200, blocks, 4) == 1600 + 50
