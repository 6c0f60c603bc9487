"""Element types of a graph's tensors, as far as they are declared or follow from operators.

Compiled models declare few inner tensors, and the integer type of an operand decides which kernel
of ONNX Runtime is used.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from qcompile.ir.operators import LAYOUT, is_op
from qcompile.ir.quantized_operators import quantized_operator

# Operators whose result has the type of their first operand.
_MOVERS = (
    *LAYOUT, "Clip", "Concat", "DepthToSpace", "Gather", "GatherElements", "GatherND", "MaxPool",
    "Pad", "SpaceToDepth", "Tile",
)  # fmt: skip
# Operators whose result has that type too: of bytes alone, as those that unpack weights.
_ARITHMETIC = ("Add", "BitShift", "BitwiseAnd", "BitwiseOr", "Div", "Expand", "Mod", "Mul", "Sub")
_BYTES = (int(TensorProto.INT8), int(TensorProto.UINT8))


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """TensorProto types by tensor name; tensors of unknown type are left out."""
    types = {t.name: int(t.data_type) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.elem_type:
            types.setdefault(value.name, int(value.type.tensor_type.elem_type))
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            types[node.output[0]] = int(TensorProto.UINT8)
            continue
        result = _result_type(node, types)
        if result:
            types |= {name: result for name in node.output if name}
    return types


def _result_type(node: onnx.NodeProto, types: dict[str, int]) -> int:
    """The type of an operator's results, 0 where unknown."""
    if is_op(node, *_MOVERS):
        return types.get(node.input[0], 0)
    if is_op(node, *_ARITHMETIC):
        first = types.get(node.input[0], 0)
        return first if first in _BYTES else 0
    if is_op(node, "Cast"):
        return next((int(a.i) for a in node.attribute if a.name == "to"), 0)
    if is_op(node, "Where"):
        return types.get(node.input[1], 0)
    row = quantized_operator(node)
    if row is None or row.result.zero_point is None:
        return 0
    declared = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), 0)
    if declared:
        return int(declared)
    _, _, zero = row.result.names(node)
    if zero:
        return types.get(zero, 0)
    if row.kind == "gemm":  # without an output scale the result is float
        return 0
    if row.kind == "quantizer":
        return int(TensorProto.UINT8)
    return types.get(node.input[row.operands[0].value or 0], 0)
