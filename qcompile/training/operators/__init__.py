"""ONNX operators as functions on torch tensors, a family a file.

``OPERATORS`` is all of them, by the name that ``ir.op_name`` gives an operator.
"""

from qcompile.training.operators import (
    activations,
    convolution,
    elementwise,
    indexing,
    layout,
    matrices,
    normalization,
    quantization,
    reductions,
    shapes,
)
from qcompile.training.operators.site import Function, Operator, Operators, Site, as_tensor

_FAMILIES = (
    activations, convolution, elementwise, indexing, layout, matrices, normalization, quantization,
    reductions, shapes,
)  # fmt: skip
OPERATORS: Operators = {
    name: operator for family in _FAMILIES for name, operator in family.OPERATORS.items()
}

__all__ = ["OPERATORS", "Function", "Operator", "Operators", "Site", "as_tensor"]
