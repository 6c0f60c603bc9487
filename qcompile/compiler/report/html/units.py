"""Figures for people: three significant digits or so, with their units."""

from __future__ import annotations

import math
from collections.abc import Iterable

NONE = "–"
_MOST_DIGITS = 8


def size(count: float) -> str:
    """Bytes: 812 B, 147 kB, 23.9 MB, 1.32 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{significant(count / scale)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """12.3 µs, 4.64 ms, 1.20 s, 3 min 20 s."""
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{significant(seconds / scale)} {unit}"
    return NONE


def milliseconds(value: float) -> str:
    """A latency; a long one in seconds."""
    if value >= 10_000:
        return duration(value / 1e3)
    return f"{significant(value)} ms"


def significant(value: float) -> str:
    """Three significant digits, never in powers of ten: 1234, 123, 12.3, 1.23, 0.12."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace("-", "−")


def value(number: float | None) -> str:
    """A value of a tensor, whose size may be anything."""
    if number is None:
        return NONE
    return f"{number:.3g}".replace("-", "−")


def error(number: float) -> str:
    """1.2e−4"""
    return f"{number:.1e}".replace("e-0", "e−").replace("-", "−")


def shape(dims: Iterable[int]) -> str:
    """8×128"""
    return "×".join(map(str, dims))


def percent(share: float) -> str:
    """26.5 %"""
    return f"{100 * share:.1f} %"


def times(ratio: float) -> str:
    """2.34×"""
    return f"{significant(ratio)}×"


def count(number: int, noun: str, plural: str = "") -> str:
    """1 tensor, 1,234 tensors"""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def cosine(number: float) -> str:
    """As many digits as distinguish it from 1: 0.9989, 0.999998; else 1."""
    error = 1 - number
    if error <= 10.0**-_MOST_DIGITS:
        return "1"
    digits = min(max(4, math.ceil(-math.log10(error)) + 1), _MOST_DIGITS)
    return f"{number:.{digits}f}".replace("-", "−")
