"""qcompile: compiles ONNX models into quantized ones, then verifies, times and explains them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qcompile.errors import (
    ClusterError,
    DataError,
    GateError,
    InvariantError,
    ModelError,
    OutputError,
    PassError,
    QCompileError,
    RecipeError,
    ReportError,
    TargetError,
    TrainingError,
)

if TYPE_CHECKING:
    from qcompile.compiler.config.recipe import Recipe
    from qcompile.compiler.model_folder.write_folder import compile_folder
    from qcompile.compiler.python_api import bench, compile, sensitivity, session, verify
    from qcompile.compiler.python_train import train
    from qcompile.compiler.stages.options import CompileOptions as Options
    from qcompile.compiler.stages.options import TrainingOptions
    from qcompile.compiler.stages.result import RejectedError, Result
    from qcompile.runtime.evaluation.closeness import Gates

__version__ = "0.1.0"

__all__ = [
    "ClusterError",
    "DataError",
    "GateError",
    "Gates",
    "InvariantError",
    "ModelError",
    "Options",
    "OutputError",
    "PassError",
    "QCompileError",
    "Recipe",
    "RecipeError",
    "RejectedError",
    "ReportError",
    "Result",
    "TargetError",
    "TrainingError",
    "TrainingOptions",
    "__version__",
    "bench",
    "compile",
    "compile_folder",
    "sensitivity",
    "session",
    "train",
    "verify",
]

# Loaded at first use: --help, and an interrupt during start-up, must not wait for onnxruntime.
_LAZY = {
    "Gates": "qcompile.runtime.evaluation.closeness.Gates",
    "Options": "qcompile.compiler.stages.options.CompileOptions",
    "Recipe": "qcompile.compiler.config.recipe.Recipe",
    "RejectedError": "qcompile.compiler.stages.result.RejectedError",
    "Result": "qcompile.compiler.stages.result.Result",
    "TrainingOptions": "qcompile.compiler.stages.options.TrainingOptions",
    "bench": "qcompile.compiler.python_api.bench",
    "compile": "qcompile.compiler.python_api.compile",
    "compile_folder": "qcompile.compiler.model_folder.write_folder.compile_folder",
    "sensitivity": "qcompile.compiler.python_api.sensitivity",
    "session": "qcompile.compiler.python_api.session",
    "train": "qcompile.compiler.python_train.train",
    "verify": "qcompile.compiler.python_api.verify",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].rpartition(".")
    return getattr(import_module(module), attribute)
