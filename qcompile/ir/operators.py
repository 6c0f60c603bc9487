"""What is known of operators: domains, and the families to which they belong."""

from __future__ import annotations

from qcompile.ir.tensor import Node

ONNX = ""
MICROSOFT = "com.microsoft"


def is_op(node: Node, *ops: str) -> bool:
    """True where the node is one of ``ops``; ``com.microsoft.X`` names that domain's operators."""
    name = node.op if not node.domain or node.domain == "ai.onnx" else f"{node.domain}.{node.op}"
    return name in ops


def op_name(node: Node) -> str:
    """The operator's name as the table of rules spells it."""
    return node.op if node.domain in (None, "", "ai.onnx") else f"{node.domain}.{node.op}"


_LAYOUT = (
    "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Slice", "Split",
    "Expand",
)  # fmt: skip


MOVERS = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


def is_layout(node: Node) -> bool:
    """True for operators that move values and change none."""
    return is_op(node, *_LAYOUT)
