"""Memory of this process: how much, its peak, and returning freed memory to the system."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

_SELF = Path("/proc/self")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows, which has no getrusage
        return int(info.peak_wset)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if psutil.MACOS else largest * 1024  # getrusage(2): kB on Linux


class Resident(NamedTuple):
    """Resident memory of this process in bytes."""

    now: int
    peak: int


def resident_memory() -> Resident:
    """On Linux read from /proc (proc_pid_status(5): VmRSS, VmHWM).

    Unlike ``peak_memory``, that peak does not include the process that started this one, and it
    can be reset.
    """
    text = ""
    with suppress(OSError):
        text = (_SELF / "status").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.M))
    if len(found) < 2:
        return Resident(psutil.Process().memory_info().rss, peak_memory())
    return Resident(int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024)


def reset_peak() -> None:
    """Let the peak of ``resident_memory`` start again, where the system allows it (proc(5))."""
    with suppress(OSError):
        (_SELF / "clear_refs").write_text("5", encoding="utf-8")


def release_memory() -> None:
    """Return freed memory to the system, where the C library can.

    By itself glibc keeps it for reuse: after a session about the size of its weights, in pieces
    that do not fit what the next stage allocates. Source: malloc_trim(3), which psutil calls.
    """
    trim = getattr(psutil, "heap_trim", None)  # there is none for musl
    if trim is not None:
        trim()
