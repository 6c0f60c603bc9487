"""Memory of this process: its peak, and giving back what was freed."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from functools import cache


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    It keeps what it may need again: after a session is gone, about as much as its weights took,
    in pieces that the next stage does not fill.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none. Source: malloc_trim(3)."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
