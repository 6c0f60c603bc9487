"""A uniform sample of the rows of a stream whose length nobody knows yet.

A row's key is a hash of the seed and of its number, and the sample is the rows with the smallest
keys: a bottom-k sample (Cohen and Kaplan 2007). Which rows these are depends on seed, size and
number of rows alone. So the sample is the same however the rows are split into files, row groups or
shards, and the samples of shards merge into that of the whole.
"""

from __future__ import annotations

import numpy as np

from qcompile.quant import Array

# SplitMix64 (Steele et al. 2014): its increment, and the factors of its finalizer.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def draw_rows(rows: Array, size: int, seed: int) -> Array:
    """The row numbers, of these, that are in a sample of ``size``; all if there are no more.

    Args:
        rows: int64 [n], distinct numbers of rows, counted from 0 over the whole stream.
        size: rows of the sample, at least 1.
        seed: 0 or more.

    Returns:
        int64 [min(n, size)], ascending. It merges: what is drawn from ``a`` and ``b`` together is
        ``draw_rows(concatenate([draw_rows(a, size, seed), draw_rows(b, size, seed)]), size, seed)``
    """
    if len(rows) > size:
        keys = _keys(rows, seed)
        # Not argpartition: qemu's AVX2, on which results are checked, gives other indices for it.
        rows = rows[keys <= np.partition(keys, size - 1)[size - 1]]
    drawn: Array = np.sort(rows)
    return drawn


def _keys(rows: Array, seed: int) -> Array:
    """A key of each row, uint64: the outputs of SplitMix64 with these numbers. No two are equal."""
    [start] = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    values = (rows.astype(np.uint64) + np.uint64(1)) * _INCREMENT + start
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * factor
    keys: Array = values ^ (values >> np.uint64(31))
    return keys
