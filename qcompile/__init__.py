"""qcompile: compiles ONNX models into quantized ones, then verifies, times and explains them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qcompile._version import __version__
from qcompile.errors import QCompileError

if TYPE_CHECKING:
    from qcompile.config.recipe import Recipe
    from qcompile.evaluation.closeness import Gates
    from qcompile.python_api import bench, compile, sensitivity, verify
    from qcompile.stages.job import Options, RejectedError, Result

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
    "Gates": "evaluation.closeness",
    "Options": "stages.job",
    "Recipe": "config.recipe",
    "RejectedError": "stages.job",
    "Result": "stages.job",
    "bench": "python_api",
    "compile": "python_api",
    "sensitivity": "python_api",
    "verify": "python_api",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qcompile.{_LAZY[name]}"), name)
