"""qcompile: compiles ONNX models into quantized ones, then verifies, times and explains them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qcompile._version import __version__
from qcompile.errors import QCompileError

if TYPE_CHECKING:
    from qcompile.compare import Gates
    from qcompile.job import Options, RejectedError, Result
    from qcompile.python import bench, compile, sensitivity, verify
    from qcompile.recipe import Recipe

__all__ = [
    "Gates",
    "Options",
    "QCompileError",
    "Recipe",
    "RejectedError",
    "Result",
    "__version__",
    "bench",
    "compile",
    "sensitivity",
    "verify",
]

# Loaded at first use: --help, and an interrupt during start-up, must not wait for onnxruntime.
_LAZY = {
    "Gates": "compare",
    "Options": "job",
    "Recipe": "recipe",
    "RejectedError": "job",
    "Result": "job",
    "bench": "python",
    "compile": "python",
    "sensitivity": "python",
    "verify": "python",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qcompile.{_LAZY[name]}"), name)
