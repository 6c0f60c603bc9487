"""What machine and which library versions a figure was measured with; this process's memory."""

from __future__ import annotations

import ctypes
import platform
import resource
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# cpuinfo flags that decide which integer kernels ONNX Runtime runs, fastest first.
_FLAGS = {
    "amx_int8": "AMX-INT8",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX512F",
    "avx2": "AVX2",
    "i8mm": "I8MM",
    "asimddp": "DOTPROD",
}


def instruction_sets() -> list[str]:
    """Names of the integer-relevant instruction sets of this machine; empty where unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    lines = [x for x in text.splitlines() if x.startswith(("flags", "Features"))]
    flags = set(lines[0].split()) if lines else set()
    return [name for flag, name in _FLAGS.items() if flag in flags]


def describe() -> dict[str, object]:
    """Processor, instruction sets and versions, for reports."""
    packages = ("onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")
    return {
        "machine": platform.machine(),
        "isa": instruction_sets(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    """Of the package or of its build for another device, such as onnxruntime-gpu."""
    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


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
