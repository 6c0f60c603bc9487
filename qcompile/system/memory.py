"""Memory of this process: how much, its peak, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

_SELF = Path("/proc/self")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Resident(NamedTuple):
    """Resident memory of this process in bytes."""

    now: int
    peak: int


def resident_memory() -> Resident | None:
    """Read from /proc (proc_pid_status(5): VmRSS, VmHWM); None on systems without it.

    Unlike the peak of ``getrusage``, this one does not include that of the process that started
    this one.
    """
    try:
        text = (_SELF / "status").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.M))
    if len(found) < 2:
        return None
    return Resident(int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024)


def reset_peak() -> None:
    """Let the peak of ``resident_memory`` start again, where the system allows it (proc(5))."""
    with suppress(OSError):
        (_SELF / "clear_refs").write_text("5")


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
