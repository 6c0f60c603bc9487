"""AdaRound: better than nearest where inputs are correlated, and only ever up or down."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from qcompile.quant import Array
from qcompile.quant.rounding.adaround import Schedule, adarounded
from qcompile.quant.rounding.gptq import compensated_codes, damped
from qcompile.quant.rounding.lattice import Lattice, fitted
from qcompile.quant.rounding.lattice_search import output_error
from qcompile.rewriting.testing import normal


def correlated(channels: int, seed: int = 0) -> Array:
    """Undamped second moments of channels that are mixtures of a quarter as many sources."""
    x = normal(200, channels // 4, seed=seed) @ normal(channels // 4, channels, seed=seed + 1)
    x = x + np.float32(0.1) * normal(200, channels, seed=seed + 2)
    gram: Array = x.T @ x
    return gram


def moments(channels: int, seed: int = 0) -> Array:
    found = damped(correlated(channels, seed), 0.01)
    assert found is not None
    return found


def error(w: Array, gram: Array, lattice: Lattice, codes: Array) -> float:
    return float(output_error(w, gram, lattice.real(codes)).sum())


def down(w: Array, lattice: Lattice) -> Array:
    """The smaller of the two codes next to each value."""
    steps = np.floor(np.clip(w / lattice.by_row() + lattice.middle, 0, lattice.largest_code))
    codes: Array = np.minimum(steps, lattice.largest_code - 1).astype(np.uint8)
    return codes


@pytest.mark.parametrize(("bits", "block"), [(2, None), (3, 16), (4, None), (4, 24)])
def test_the_outputs_are_closer_than_with_nearest(bits: int, block: int | None) -> None:
    w, gram = normal(64, 24), moments(64)
    lattice = fitted(w, bits, block=block)
    codes = adarounded(w, gram, lattice)
    assert error(w, gram, lattice, codes) < 0.5 * error(w, gram, lattice, lattice.nearest(w))
    # Some are rounded away from their nearest, but none beyond its two neighbours.
    assert (codes != lattice.nearest(w)).mean() > 0.1
    assert codes.dtype == np.uint8 and set(np.unique(codes - down(w, lattice))) <= {0, 1}


def test_it_is_better_than_gptq_that_it_starts_from() -> None:
    w, gram = normal(64, 24), moments(64)
    lattice = fitted(w, 3)
    first = compensated_codes(w, correlated(64), lattice, 0.01)
    found = adarounded(w, gram, lattice, first)
    assert error(w, gram, lattice, found) < 0.95 * error(w, gram, lattice, first)


def test_what_it_starts_from_may_be_far_from_the_value() -> None:
    """Its codes stay reachable, or the neighbours towards the value."""
    w, gram = normal(8, 3), np.eye(8, dtype=np.float32)
    lattice = fitted(w, 4)
    for first in (np.zeros((8, 3), np.uint8), np.full((8, 3), 15, np.uint8)):
        found = adarounded(w, gram, lattice, first).astype(int)
        assert (np.abs(found - first) <= 1).all()
        low = down(w, lattice).astype(int)
        assert ((found >= np.minimum(low, first)) & (found <= np.maximum(low + 1, first))).all()


def test_it_is_among_the_best_of_all_roundings() -> None:
    """All 256 roundings of 8 inputs: of 20 outputs, the mean rank of what is found, from 0."""
    ranks = []
    for seed in range(20):
        w, gram = normal(8, 1, seed=seed), moments(8, seed=seed + 100)
        lattice = fitted(w, 3)
        low = down(w, lattice)
        every = [low + np.array(up, np.uint8)[:, None] for up in product((0, 1), repeat=8)]
        errors = np.array([error(w, gram, lattice, codes) for codes in every])
        found = [adarounded(w, gram, lattice), lattice.nearest(w)]
        ranks.append([(errors < 0.999 * error(w, gram, lattice, codes)).sum() for codes in found])
    learned, nearest = np.mean(ranks, axis=0)
    assert learned < 20 and learned < nearest / 2


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    w, gram = normal(32, 8), np.diag(np.geomspace(0.01, 100, 32)).astype(np.float32)
    lattice = fitted(w, 4, block=8)
    clear = np.abs(w / lattice.by_row() % 1 - 0.5) > 0.05  # not halfway
    assert np.array_equal(adarounded(w, gram, lattice)[clear], lattice.nearest(w)[clear])


def test_exact_weights_stay() -> None:
    lattice = fitted(normal(40, 6), 4, block=16)
    codes = np.random.default_rng(0).integers(0, 16, (40, 6)).astype(np.uint8)
    exact = lattice.real(codes)
    assert np.array_equal(adarounded(exact, moments(40), lattice), codes)


def test_values_beyond_the_range_get_its_end() -> None:
    w = np.array([[100], [-100], [0.3]], np.float32)
    lattice = Lattice(np.ones((1, 1), np.float32), 4, 3, 3)
    assert adarounded(w, np.eye(3, dtype=np.float32), lattice).ravel().tolist() == [15, 0, 8]


def test_the_same_input_gives_the_same_codes() -> None:
    w, gram = normal(48, 300), moments(48)
    lattice = fitted(w, 4, block=16)
    kept = w.copy(), gram.copy()
    first = adarounded(w, gram, lattice)
    assert np.array_equal(adarounded(w, gram, lattice), first)
    assert np.array_equal(w, kept[0]) and np.array_equal(gram, kept[1])
    # Outputs do not depend on each other, nor on the units of the data.
    assert np.array_equal(adarounded(w, gram * 1024, lattice), first)
    some = Lattice(lattice.scale[:, 128:256], 4, 48, 16)
    assert np.array_equal(adarounded(w[:, 128:256], gram, some), first[:, 128:256])


def test_more_steps_are_not_worse() -> None:
    w, gram = normal(64, 24), moments(64)
    lattice = fitted(w, 3)
    errors = [
        error(w, gram, lattice, adarounded(w, gram, lattice, schedule=Schedule(steps)))
        for steps in (30, 300, 1200)
    ]
    assert errors == sorted(errors, reverse=True)


def test_without_steps_it_starts_and_ends_at_nearest() -> None:
    w, lattice = normal(16, 4), fitted(normal(16, 4), 4)
    found = adarounded(w, moments(16), lattice, schedule=Schedule(0))
    assert np.array_equal(found, lattice.nearest(w))
    first = compensated_codes(w, correlated(16), lattice, 0.01)
    assert np.array_equal(adarounded(w, moments(16), lattice, first, Schedule(0)), first)


def test_what_does_not_fit_is_refused() -> None:
    w, gram, lattice = normal(16, 4), moments(16), fitted(normal(16, 4), 4)
    with pytest.raises(ValueError, match=r"values have shape \[8, 4\], expected \[16, 4\]"):
        adarounded(w[:8], gram, lattice)
    with pytest.raises(ValueError, match=r"moments have shape \[8, 8\]"):
        adarounded(w, gram[:8, :8], lattice)
    with pytest.raises(ValueError, match=r"start have shape"):
        adarounded(w, gram, lattice, np.zeros((4, 16), np.uint8))
    with pytest.raises(ValueError, match="damp"):
        adarounded(w, np.zeros((16, 16), np.float32), lattice)
