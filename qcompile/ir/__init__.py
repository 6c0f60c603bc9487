"""The graph, its tensors and its operators: what a pass imports."""

from qcompile.ir.graph import Graph, has_subgraph
from qcompile.ir.operators import (
    MICROSOFT,
    ONNX,
    domain_of,
    is_layout,
    is_onnx_domain,
    is_op,
    op_name,
)
from qcompile.ir.tensor import (
    Constant,
    Node,
    Shape,
    Tensor,
    Variable,
    array,
    is_constant,
    is_float,
    is_zero,
    rank,
    scalar,
    shape_of,
)

__all__ = [
    "MICROSOFT",
    "ONNX",
    "Constant",
    "Graph",
    "Node",
    "Shape",
    "Tensor",
    "Variable",
    "array",
    "domain_of",
    "has_subgraph",
    "is_constant",
    "is_float",
    "is_layout",
    "is_onnx_domain",
    "is_op",
    "is_zero",
    "op_name",
    "rank",
    "scalar",
    "shape_of",
]
