"""A random order of any number of things, of which nothing is kept in memory."""

from __future__ import annotations

import numpy as np

from qcompile.quant import Array

_ROUNDS = 6
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Shuffle:
    """A permutation of 0 to ``count`` - 1, a function of the seed, computed element by element.

    A Feistel network permutes the next power of four; a number outside of the range is permuted
    again until it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, the
    cycle-walking and the generalized Feistel cipher). Its rounds mix as SplitMix64 does (Steele et
    al. 2014, the finalizer).
    """

    def __init__(self, count: int, *seed: int) -> None:
        self._count = count
        self._bits = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        self._keys = np.random.default_rng(seed).integers(1 << 63, size=_ROUNDS, dtype=np.uint64)

    def __call__(self, positions: Array) -> Array:
        """The numbers at these positions, int64."""
        values = positions.astype(np.uint64)
        outside = np.ones(len(values), bool)
        while outside.any():
            values[outside] = self._permuted(values[outside])
            outside = values >= self._count
        return values.astype(np.int64)

    def _permuted(self, values: Array) -> Array:
        left, right = values >> self._bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return (left << self._bits) | right


def _mixed(values: Array) -> Array:
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * factor
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed
