"""Each number comes once, in an order that only the seed decides."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.training.labelled.shuffle import Shuffle


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_it_is_a_permutation(count: int) -> None:
    found = Shuffle(count, 7, 1)(np.arange(count))
    assert sorted(found.tolist()) == list(range(count))


def test_parts_are_parts_of_the_whole() -> None:
    shuffle = Shuffle(1000, 3)
    whole = shuffle(np.arange(1000))
    assert (shuffle(np.arange(400, 500)) == whole[400:500]).all()


def test_the_seed_decides() -> None:
    first, again, other = (Shuffle(1000, 1, epoch)(np.arange(1000)) for epoch in (0, 0, 1))
    assert (first == again).all() and (first != other).mean() > 0.9


def test_neighbours_are_separated() -> None:
    """Files are often sorted by label, so positions and numbers must not be correlated."""
    count = 3000
    found = Shuffle(count, 0)(np.arange(count))
    # Of random orders, the correlation has standard deviation 1/sqrt(n - 1); 5 of them are allowed.
    assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 5 / np.sqrt(count - 1)
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 5 / np.sqrt(count - 2)


def test_a_file_larger_than_any_memory() -> None:
    found = Shuffle(10**12, 5)(np.arange(10**12 - 1000, 10**12))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 10**12
