"""Memory of this process: its peak, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from functools import cache


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Return freed memory to the system, where the C library is glibc.

    By itself glibc keeps it for reuse: after a session about the size of its weights, in pieces
    that do not fit what the next stage allocates.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, None with other C libraries. Source: malloc_trim(3)."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
