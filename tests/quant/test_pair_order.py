"""Large weights of one sign come into different pairs, so that int8 scales become smaller."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.quant import Array, pair_order
from qcompile.quant.weight_rounding import weight_params
from qcompile.rewriting.testing import normal
from qcompile.targets.cpu import ALONE, WEIGHT

properties = settings(deadline=None, derandomize=True, max_examples=100)
floats = st.floats(-(2.0**20), 2.0**20, width=32)
blocks = st.tuples(*[st.integers(1, 3), st.integers(1, 9), st.integers(1, 2), st.integers(1, 4)])
weights = blocks.flatmap(lambda shape: arrays(np.float32, shape, elements=floats))


def ordered(weight: Array) -> Array:
    return np.take_along_axis(weight, pair_order(weight)[..., None, None], 1)


def noise(weight: Array) -> float:
    """The sum of squared scales of blocks of an even number of channels, as they are quantized."""
    rows = weight.swapaxes(1, 2).reshape(-1, weight.shape[-1])
    return float(np.square(weight_params(rows, WEIGHT).scale, dtype=np.float64).sum())


@given(weights)
@properties
def test_a_permutation_of_each_block_and_never_worse(weight: Array) -> None:
    count, channels, *_ = weight.shape
    found = pair_order(weight)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(channels), (count, 1)))
    if channels % 2 == 0 or weight.size == channels * weight.shape[-1]:
        assert noise(ordered(weight)) <= noise(weight)


def test_two_large_weights_part() -> None:
    column = np.array([5, 4, -5, -4, 0, 0, 0, 0], np.float32)
    found = ordered(column[None, :, None, None]).reshape(4, 2)
    assert np.max(np.abs(found.sum(1))) <= 5


def test_most_of_what_the_bound_costs_is_regained() -> None:
    weight = normal(1, 512, 1, 64)
    plain = np.square(weight_params(weight[0, :, 0], ALONE).scale).sum()
    before, after = noise(weight) / plain - 1, noise(ordered(weight)) / plain - 1
    assert after < 0.35 * before


def test_blocks_and_repeats_share_the_scales() -> None:
    """Each block alone could be in any order: what counts is the worst pair of all."""
    weight = normal(4, 16, 3, 8)
    assert noise(ordered(weight)) < 0.95 * noise(weight)


def test_long_blocks_are_cut() -> None:
    weight = normal(1, 2051, 1, 2)
    found = pair_order(weight)[0]
    assert sorted(found) == list(range(2051)) and found[-1] == 2050
    assert set(found[:1024]) == set(range(1024))
    assert noise(ordered(weight)) < noise(weight)


def test_the_same_weights_give_the_same_order() -> None:
    weight = normal(2, 32, 1, 8)
    assert np.array_equal(pair_order(weight), pair_order(weight.copy()))


def test_weights_without_values_and_tiny_ones() -> None:
    for weight in (np.zeros((1, 4, 1, 3), np.float32), np.full((1, 4, 1, 3), 1e-42, np.float32)):
        assert np.array_equal(pair_order(weight), [[0, 1, 2, 3]])
