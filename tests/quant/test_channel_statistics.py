"""Statistics of channels have one layout, since sums of floats depend on it."""

from __future__ import annotations

import numpy as np

from qcompile.quant import ChannelStats


def stats() -> ChannelStats:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    moments = rows.T @ rows
    return ChannelStats(rows.min(0), rows.max(0), rows, moments=moments, mean=rows.mean(0))


def in_c_order(found: ChannelStats) -> bool:
    assert found.moments is not None
    return bool(found.rows.flags.c_contiguous and found.moments.flags.c_contiguous)


def test_permuted_channels_are_laid_out_as_in_a_file() -> None:
    """numpy's ``rows[:, order]`` alone is in Fortran order."""
    order = np.array([2, 0, 3, 1])
    found = stats().permuted(order)
    assert not stats().rows[:, order].flags.c_contiguous
    assert in_c_order(found)
    assert found.rows.tolist() == stats().rows[:, order].tolist()


def test_any_layout_is_taken() -> None:
    one = stats()
    assert one.moments is not None
    other = ChannelStats(
        one.lo, one.hi, np.asfortranarray(one.rows), moments=np.asfortranarray(one.moments)
    )
    assert in_c_order(other)
    assert in_c_order(other.scaled(np.array([1, 2, 3, 4], np.float32)))
    assert other.rows.tolist() == one.rows.tolist()


def test_rows_in_c_order_are_not_copied() -> None:
    rows = np.zeros((3, 4), np.float32)
    assert ChannelStats(rows[0], rows[0], rows).rows is rows
