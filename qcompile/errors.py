"""The exception classes. Every error that a user can cause or meet derives from QCompileError.

A message states what was found, where (pass, node, tensor, file), and what was expected.
"""

from __future__ import annotations


class QCompileError(Exception):
    """Base of all errors of this package; the command line prints it as one line and exits 2."""

    exit_code = 2


class ModelError(QCompileError):
    """The input model cannot be read, or is not a valid ONNX model."""


class DataError(QCompileError):
    """Calibration or verification data does not fit the model, or holds no usable values."""


class RecipeError(QCompileError):
    """A recipe, a pipeline string or an option names something unknown or contradictory."""


class TargetError(QCompileError):
    """The target does not exist, or cannot run what was asked for."""


class TrainingError(QCompileError):
    """A graph or its data cannot be trained, or training found no usable values."""


class ClusterError(QCompileError):
    """Workers cannot be reached, differ from this machine, or were lost too often."""


class OutputError(QCompileError):
    """The output cannot be written where it was asked for."""


class ReportError(QCompileError):
    """A file that should hold a report cannot be read, or holds something else."""


class PassError(QCompileError):
    """A pass broke its contract: a bug of the pass. The message names the pass and the node."""


class InvariantError(PassError):
    """A graph or plan invariant does not hold."""


class GateError(QCompileError):
    """The compiled model is worse or slower than the gates allow; nothing was written."""

    exit_code = 1
