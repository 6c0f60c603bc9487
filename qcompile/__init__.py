"""qcompile: compiles ONNX models into quantized ones, then verifies, times and explains them."""

from qcompile._version import __version__
from qcompile.errors import QCompileError

__all__ = ["QCompileError", "__version__"]
