"""Samples of rows: the same however the data is split, and what parts of the data leave out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompile.calibration.row_sample import RowSample, hashes
from qcompile.quant import Array
from qcompile.rewriting.testing import normal


def sample(rows: Array, limit: int) -> RowSample:
    found = RowSample(limit)
    found.add(rows)
    return found


def test_the_rows_with_the_smallest_hashes_in_their_order() -> None:
    rows = normal(50, 8)
    keys = hashes(rows)
    found = sample(rows, 12)
    assert np.array_equal(found.keys, np.sort(keys)[:12])
    assert np.array_equal(found.rows, rows[np.argsort(keys, kind="stable")[:12]])
    assert found.threshold == found.keys[-1] and not found.lacks_rows


def test_a_sample_of_nothing() -> None:
    with pytest.raises(ValueError, match="no rows were seen"):
        _ = RowSample().rows
    assert sample(normal(0, 8), 4).rows.shape == (0, 8)


def test_equal_hashes_keep_their_order() -> None:
    """Sparse rows often have equal hashes: of these the earlier ones stay, in their order."""
    rng = np.random.default_rng(0)
    rows = np.where(rng.random((4000, 64)) < 0.03, rng.normal(size=(4000, 64)), 0)
    rows = rows.astype(np.float32)
    alone, merged = RowSample(100), RowSample(100)
    for part in np.array_split(rows, 37):
        alone.add(part)
    for part in np.array_split(rows, 5):
        merged.merge(sample(part, 100))
    assert np.array_equal(alone.rows, merged.rows)


def test_rows_that_wait_are_copies() -> None:
    """Sources may reuse arrays."""
    found, rows = RowSample(100), normal(3, 8)
    found.add(rows)
    rows[:] = 0
    assert found.rows.all()


@pytest.mark.parametrize("limit", [40, 4])
def test_a_merged_sample_has_no_rows_over_what_one_of_its_parts_left_out(limit: int) -> None:
    part, merged = sample(normal(30, 8), 40), sample(normal(25, 8, seed=1), limit)
    bound = int(part.keys[9])
    part.leave_out(bound)
    merged.merge(part)
    assert merged.keys.max() <= bound
    keys = np.concatenate([hashes(normal(30, 8)), hashes(normal(25, 8, seed=1))])
    assert np.array_equal(merged.keys, np.sort(keys[keys <= bound])[:limit])
    # Four rows have smaller hashes than all that were left out, and are the sample of all data.
    assert merged.lacks_rows == (limit == 40)


def test_rows_over_a_bound_do_not_enter_later() -> None:
    part = sample(normal(30, 8), 40)
    part.leave_out(int(part.keys[9]))
    assert len(part.rows) == 10
    part.add(normal(25, 8, seed=1))
    assert part.bound is not None and part.keys.max() <= part.bound


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_part_of_the_rows_tells_which_may_be_in_the_sample(share: float) -> None:
    """Few more rows than are needed, and in 50 parts of random rows never fewer."""
    rng, most = np.random.default_rng(0), 0
    for _ in range(50):
        rows = rng.normal(size=(20_000, 4)).astype(np.float32)
        whole, part = sample(rows, 100), sample(rows[: round(len(rows) * share)], 100)
        bound = part.likely_bound(share)
        if bound is not None:
            part.leave_out(bound)
            assert whole.threshold is not None and bound >= whole.threshold
        most = max(most, len(part.rows))
    expected = 100 * share
    assert most == min(100, math.ceil(expected + 3.5 * math.sqrt(expected) + 8))
