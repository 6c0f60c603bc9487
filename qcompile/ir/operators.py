"""What is known of operators: domains, and the families to which they belong."""

from __future__ import annotations

import numpy as np

from qcompile.ir.tensor import Node, Tensor, scalar

ONNX = ""
MICROSOFT = "com.microsoft"
_STANDARD = (None, ONNX, "ai.onnx")  # all of them mean ONNX itself


def is_op(node: Node, *ops: str) -> bool:
    """True where the node is one of ``ops``; ``com.microsoft.X`` names that domain's operators."""
    return op_name(node) in ops


def op_name(node: Node) -> str:
    """The operator's name as tables of operators spell it, with its domain but for ONNX's own."""
    return node.op if node.domain in _STANDARD else f"{node.domain}.{node.op}"


def domain_of(node: Node) -> str:
    """The domain of the operator, one spelling for ONNX's own."""
    return ONNX if node.domain in _STANDARD else str(node.domain)


_LAYOUT = (
    "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Slice", "Split",
    "Expand",
)  # fmt: skip


MOVERS = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


def is_layout(node: Node) -> bool:
    """True for operators that move values and change none."""
    return is_op(node, *_LAYOUT)


def is_plain_gemm(node: Node) -> bool:
    """True for a MatMul, and a Gemm that neither scales nor transposes its data."""
    attrs = node.attrs
    scaled = attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0
    return not scaled and not attrs.get("transA", 0)


def scaled_operand(node: Node) -> tuple[Tensor, float] | None:
    """x and c of ``x · c``, a Mul or Div by a finite scalar constant but 0; None of other nodes."""
    if not is_op(node, "Mul", "Div"):
        return None
    divides = is_op(node, "Div")
    for i in (1,) if divides else (1, 0):
        value, data = scalar(node.inputs[i]), node.inputs[1 - i]
        if value is not None and scalar(data) is None:
            usable = np.isfinite(value) and value != 0
            return (data, 1 / value if divides else value) if usable else None
    return None
