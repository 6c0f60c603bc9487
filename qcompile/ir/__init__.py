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
from qcompile.ir.refusal import Refusal
from qcompile.ir.scalar_factors import is_plain_gemm, scaled_operand
from qcompile.ir.tensor import (
    HALF_TYPES,
    Constant,
    HalfType,
    Node,
    Shape,
    Tensor,
    Variable,
    array,
    half_type,
    is_constant,
    is_float,
    is_zero,
    rank,
    scalar,
    shape_of,
)

__all__ = [
    "HALF_TYPES",
    "MICROSOFT",
    "ONNX",
    "Constant",
    "Graph",
    "HalfType",
    "Node",
    "Refusal",
    "Shape",
    "Tensor",
    "Variable",
    "array",
    "domain_of",
    "half_type",
    "has_subgraph",
    "is_constant",
    "is_float",
    "is_layout",
    "is_onnx_domain",
    "is_op",
    "is_plain_gemm",
    "is_zero",
    "op_name",
    "rank",
    "scalar",
    "scaled_operand",
    "shape_of",
]
