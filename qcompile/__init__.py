"""qcompile: compiles ONNX models into quantized ones, then verifies, times and explains them."""

from qcompile._version import __version__
from qcompile.compare import Gates
from qcompile.errors import QCompileError
from qcompile.job import Options, RejectedError, Result
from qcompile.python import bench, compile, verify
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
    "verify",
]
