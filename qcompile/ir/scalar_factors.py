"""Scalar factors: constants by which a Mul, Div or Gemm multiplies its input."""

from __future__ import annotations

import numpy as np

from qcompile.ir.operators import is_op
from qcompile.ir.tensor import Node, Tensor, scalar


def scaled_operand(node: Node) -> tuple[Tensor, float] | None:
    """x and c of ``x · c``, for a Mul or Div by a finite nonzero scalar constant; else None."""
    if not is_op(node, "Mul", "Div"):
        return None
    divides = is_op(node, "Div")
    for i in (1,) if divides else (1, 0):
        value, data = scalar(node.inputs[i]), node.inputs[1 - i]
        if value is not None and scalar(data) is None:
            usable = np.isfinite(value) and value != 0
            return (data, 1 / value if divides else value) if usable else None
    return None


def is_plain_gemm(node: Node) -> bool:
    """True for a MatMul, and for a Gemm without alpha, beta and transA."""
    attrs = node.attrs
    scaled = attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0
    return not scaled and not attrs.get("transA", 0)
