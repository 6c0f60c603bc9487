"""Finds constants with the same contents, so that a weight is stored once for all its readers.

Candidates have the same type and shape, and a sample of their values in common. They are then
compared byte by byte in chunks: contents are read only where they are probably equal.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from qcompile.ir.tensor import Constant, array
from qcompile.quant import Array

_LEAST = 1 << 10  # bytes
_SAMPLE = 1 << 10  # values that are looked at to find candidates
_CHUNK = 1 << 22  # values that are compared at once


class EqualConstants:
    """A set of constants in which each content occurs once.

    accepts: shape and bytes of the constants that are looked at, by default weights.
    """

    def __init__(self, accepts: Callable[[tuple[int, ...], int], bool] | None = None) -> None:
        self._accepts = accepts or is_weight
        self._found: dict[Hashable, list[Constant]] = {}

    def find(self, values: Array) -> Constant | None:
        """The first constant that was added with these values, of the same type and shape."""
        if not self._accepts(values.shape, values.nbytes):
            return None
        candidates = self._found.get(_sample(values), ())
        return next((c for c in candidates if _equal(array(c), values)), None)

    def add(self, constant: Constant) -> None:
        """Let ``find`` find a constant; those that are not accepted are left out."""
        values = array(constant)
        if self._accepts(values.shape, values.nbytes):
            self._found.setdefault(_sample(values), []).append(constant)


def is_weight(shape: tuple[int, ...], size: int) -> bool:
    """True for a matrix or a kernel of some size, in bytes.

    Vectors are left alone: biases that are all zero have nothing in common, and a shared one would
    keep rewrites from changing it for one reader.
    """
    return size >= _LEAST and sum(d > 1 for d in shape) > 1


def _sample(values: Array) -> Hashable:
    flat = values.reshape(-1) if values.flags.c_contiguous else values.flat
    step = -(-values.size // _SAMPLE)
    # The type itself: ``dtype.str`` is the same for int4 and uint4.
    return values.dtype, values.shape, np.asarray(flat[::step]).tobytes()


def _equal(first: Array, second: Array) -> bool:
    """True where all bytes agree: NaN equals itself, and zero is not minus zero."""
    rows = max(1, _CHUNK * len(first) // max(first.size, 1))
    return all(
        first[i : i + rows].tobytes() == second[i : i + rows].tobytes()
        for i in range(0, len(first), rows)
    )
