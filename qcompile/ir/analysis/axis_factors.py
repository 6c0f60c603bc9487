"""Axes as products of factors that can be merged and split: a union-find with refinement.

An axis of 384 channels may be 12 heads of 32: Reshape splits it and joins it again. Properties
belong to factors, so that a later split applies to every axis merged before. Sizes are vectors with
one number per probe (shape_probing.py), so that a factor of varying size differs from one that
happens to be as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Size: TypeAlias = tuple[int, ...]


@dataclass(eq=False)
class Factor:
    """One factor; ``parts`` has the factor that it was merged into, or the two it was split into.

    ``pinned``: why its order must stay, None where it is free. ``weighted``: it belongs to an axis
    of a linear's weight or to the columns of a table.
    """

    size: Size
    pinned: str | None = None
    weighted: bool = False
    parts: tuple[Factor, ...] = ()
    merged: int = (
        1  # factors merged into it; the larger one survives a merge, so that chains stay short
    )

    @property
    def fixed(self) -> int | None:
        """Its size, None where that varies between probes."""
        return self.size[0] if len(set(self.size)) == 1 else None


# Factors, the major one first; an axis of size one has none.
Axis: TypeAlias = list[Factor]


def axis_of(size: Size, pinned: str | None = None) -> Axis:
    """A new axis of that size."""
    return [Factor(size, pinned)] if any(n != 1 for n in size) else []


def leaves(axis: Sequence[Factor]) -> list[Factor]:
    """The current factors, after all merges and splits."""
    current: list[Factor] = []
    for factor in axis:
        if factor.parts:
            factor.parts = tuple(leaves(factor.parts))
            current += factor.parts
        else:
            current.append(factor)
    return current


def size_of(axis: Sequence[Factor], probes: int) -> Size:
    """The product of the factors' sizes."""
    total: Size = (1,) * probes
    for factor in axis:
        total = tuple(a * b for a, b in zip(total, factor.size, strict=True))
    return total


def pin(axis: Sequence[Factor], reason: str) -> None:
    """Keep the order of an axis; the first reason stands."""
    for factor in leaves(axis):
        factor.pinned = factor.pinned or reason


def unify(left: Axis, right: Axis) -> bool:
    """Give two axes one order; False where their factors do not align."""
    ours, theirs = list(reversed(left)), list(reversed(right))
    while True:
        a, b = _next(ours), _next(theirs)
        if a is None or b is None:
            return a is b
        if a is b:
            continue
        if a.size == b.size:
            _merge(a, b)
        elif _divides(b.size, a.size):
            _split(a, b.size)
            ours.append(a)
            theirs.append(b)
        elif _divides(a.size, b.size):
            _split(b, a.size)
            ours.append(a)
            theirs.append(b)
        else:
            return False


def regroup(axes: Sequence[Axis], sizes: Sequence[Size]) -> list[Axis] | None:
    """The axes of a Reshape to ``sizes``, in row-major order; None where factors do not align."""
    waiting = [factor for axis in reversed(axes) for factor in reversed(axis)]
    grouped: list[Axis] = []
    for size in sizes:
        axis: Axis = []
        while any(n != 1 for n in size):
            factor = _next(waiting)
            if factor is None:
                return None
            if _divides(factor.size, size):
                axis.append(factor)
                size = _quotient(size, factor.size)
            elif _divides(size, factor.size):
                _split(factor, size)
                waiting.append(factor)
            else:
                return None
        grouped.append(axis)
    return None if _next(waiting) is not None else grouped


def _next(stack: list[Factor]) -> Factor | None:
    """Pop the next current factor off a stack."""
    while stack:
        factor = stack.pop()
        if not factor.parts:
            return factor
        stack += reversed(leaves([factor]))
    return None


def _merge(a: Factor, b: Factor) -> None:
    kept, gone = (a, b) if a.merged >= b.merged else (b, a)
    kept.pinned = a.pinned or b.pinned
    kept.weighted = a.weighted or b.weighted
    kept.merged = a.merged + b.merged
    gone.parts = (kept,)


def _split(factor: Factor, major: Size) -> None:
    minor = _quotient(factor.size, major)
    factor.parts = tuple(Factor(s, factor.pinned, factor.weighted) for s in (major, minor))


def _divides(part: Size, whole: Size) -> bool:
    return all(p and not w % p for p, w in zip(part, whole, strict=True))


def _quotient(whole: Size, part: Size) -> Size:
    return tuple(w // p for w, p in zip(whole, part, strict=True))
