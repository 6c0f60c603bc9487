"""What machine and which library versions a figure was measured with; this process's memory."""

from __future__ import annotations

import platform
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
