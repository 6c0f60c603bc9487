"""A sample of rows, those with the smallest hashes: the same however the data was split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qcompile.quant import Array

ROWS = 1024
# Odd multipliers of Knuth's multiplicative hashing; any fixed values do.
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HASHED_CHANNELS = 32
# How many more rows than expected are kept of a part of the data: these standard deviations, and
# some for the long tail of small numbers. More come in one of some 10,000 parts.
_DEVIATIONS, _MORE = 3.5, 8


@dataclass
class RowSample:
    """At most ``limit`` rows, float32 (n, channels), those with the smallest hash.

    A row's hash depends on its values alone, and of equal hashes the earlier row comes first: a
    bottom-k sketch (Cohen and Kaplan 2007), which makes ``merge`` exact. ``bound``: rows with a
    larger hash were left out, None while every row that can be in the sample is. ``keep`` stores
    the rows. New rows wait until there are enough of them to sort.
    """

    limit: int = ROWS
    keep: Callable[[Array], Array] | None = None
    bound: int | None = None
    _rows: Array | None = None
    _keys: Array = field(default_factory=lambda: np.zeros(0, np.uint64))  # sorted
    _waiting: list[tuple[Array, Array]] = field(default_factory=list)

    @property
    def threshold(self) -> int | None:
        """A hash that later rows must be below to enter the sample; None while any can."""
        return int(self._keys[-1]) if len(self._keys) == self.limit else None

    @property
    def rows(self) -> Array:
        """The sample, float32 (n, channels), sorted by hash. Raises ValueError before any row."""
        self._sort()
        if self._rows is None:
            raise ValueError("no rows were seen")
        return self._rows

    @property
    def keys(self) -> Array:
        """Hashes of the rows, uint64 (n,), sorted."""
        self._sort()
        return self._keys

    @property
    def lacks_rows(self) -> bool:
        """True where rows that were left out belong into the sample."""
        self._sort()
        return self.bound is not None

    def add(self, rows: Array) -> None:
        """Rows of data, float32 (n, channels)."""
        self._take(rows, hashes(rows))

    def merge(self, later: RowSample) -> None:
        """Add the sample of later data."""
        keys = later.keys
        if later.bound is not None:
            self.leave_out(later.bound)
        self._take(later.rows, keys)

    def restore(self, rows: Array, keys: Array, bound: int | None) -> None:
        """Continue from an earlier sample's rows and keys."""
        self._rows, self._keys, self.bound = rows, keys, bound

    def leave_out(self, bound: int) -> None:
        """Drop rows with a hash over ``bound``, now and later."""
        self.bound = bound if self.bound is None else min(self.bound, bound)

    def likely_bound(self, share: float) -> int | None:
        """The hash that those of the sample of all data hardly exceed, where the rows here are a
        ``share`` of all; None where they are too few to tell.
        """
        likely = likely_rows(share, self.limit)
        known = np.concatenate([self._keys, *(keys for _, keys in self._waiting)])
        return int(np.partition(known, likely - 1)[likely - 1]) if likely < len(known) else None

    def _take(self, rows: Array, keys: Array) -> None:
        if self._rows is None:
            self._rows = rows[:0].copy()
        fits = np.ones(len(keys), bool)
        if self.threshold is not None:  # skip rows that cannot enter, most of a later batch
            fits &= keys < np.uint64(self.threshold)
        if self.bound is not None:
            fits &= keys <= np.uint64(self.bound)
        self._waiting.append((rows[fits], keys[fits]))
        if sum(len(waiting) for _, waiting in self._waiting) >= self.limit // 4:
            self._sort()

    @property
    def _is_sorted(self) -> bool:
        return not self._waiting and (
            self.bound is None or len(self._keys) == 0 or self._keys[-1] <= np.uint64(self.bound)
        )

    def _sort(self) -> None:
        """Let those that wait into the sample; drop what is over the bound."""
        if self._rows is None or self._is_sorted:
            return
        rows, keys = zip((self._rows, self._keys), *self._waiting, strict=True)
        self._waiting, all_keys = [], np.concatenate(keys)
        first = np.argsort(all_keys, kind="stable")[: self.limit]
        if self.bound is not None:
            first = first[all_keys[first] <= np.uint64(self.bound)]
        if len(first) == self.limit:
            self.bound = None  # what was left out has larger hashes than these
        self._keys, kept = all_keys[first], np.concatenate(rows)[first]
        self._rows = kept if self.keep is None else self.keep(kept)


def likely_rows(share: float, limit: int = ROWS) -> int:
    """How many rows of the sample of all data a ``share`` of it hardly exceeds.

    About limit * share are expected, a number that varies as a Poisson variable does.
    """
    expected = limit * share
    return math.ceil(expected + _DEVIATIONS * math.sqrt(expected) + _MORE)


def hashes(rows: Array) -> Array:
    """A hash per row, uint64 (n,), over the bits of some evenly spaced channels."""
    step = max(1, rows.shape[1] // _HASHED_CHANNELS)
    bits = np.ascontiguousarray(rows[:, ::step].T).view(np.uint32).astype(np.uint64)
    keys = np.zeros(len(rows), np.uint64)
    for column in bits:
        keys = (keys ^ column) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys
