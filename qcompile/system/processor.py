"""The machine and library versions that a figure was measured with."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from archspec.cpu import TARGETS, detect

from qcompile.system.json_values import Record, members

# Flags, by their names on Linux, that decide which int8 kernels ONNX Runtime uses, fastest first.
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
    """Instruction sets of this machine that matter for int8, fastest first; empty where unknown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the processor cannot be identified
        found = detect.detected_info()
    flags = found.features
    if not flags and found.name in TARGETS:  # Apple's processors are identified by name
        flags = TARGETS[found.name].features
    return [name for flag, name in _FLAGS.items() if flag in flags]


@dataclass(frozen=True)
class Environment(Record):
    """Processor, instruction sets in use and versions that a figure was measured with."""

    machine: str
    isa: list[str]
    python: str
    onnx: str
    onnxruntime: str
    graphsurgeon: str
    numpy: str

    JSON = members("machine isa python onnx onnxruntime onnx-graphsurgeon=graphsurgeon numpy")


def describe_environment(isa: list[str]) -> Environment:
    """This machine, the instruction sets in use, and the installed versions."""
    packages = ("onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")
    here = platform.machine(), isa, platform.python_version()
    return Environment(*here, *map(_version, packages))


def _version(package: str) -> str:
    """Version of the package, or of its build for GPUs, such as onnxruntime-gpu."""
    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
