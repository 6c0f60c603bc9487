"""Element types of a graph's tensors, as far as they are declared or an operator's rules tell.

Compiled models declare few of their inner tensors, and which integers an operand has decides which
kernel of ONNX Runtime multiplies it.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from qcompile.ir.operators import LAYOUT, is_op
from qcompile.ir.quantized_operators import quantized_operator

# Operators that pass on the type of their first operand.
_MOVERS = (
    *LAYOUT, "Clip", "Concat", "DepthToSpace", "Gather", "GatherElements", "GatherND", "MaxPool",
    "Pad", "SpaceToDepth", "Tile",
)  # fmt: skip


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """TensorProto types by tensor name; tensors of which nothing is known are left out."""
    found = {t.name: int(t.data_type) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.elem_type:
            found.setdefault(value.name, int(value.type.tensor_type.elem_type))
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            found[node.output[0]] = int(TensorProto.UINT8)
            continue
        made = _made(node, found)
        if made:
            found |= {name: made for name in node.output if name}
    return found


def _made(node: onnx.NodeProto, known: dict[str, int]) -> int:
    """The type of an operator's results, 0 where it is not known."""
    if is_op(node, *_MOVERS):
        return known.get(node.input[0], 0)
    if is_op(node, "Where"):
        return known.get(node.input[1], 0)
    row = quantized_operator(node)
    if row is None or row.result.zero_point is None:
        return 0
    declared = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), 0)
    if declared:
        return int(declared)
    _, _, zero = row.result.names(node)
    if zero:
        return known.get(zero, 0)
    if row.kind == "gemm":  # without an output scale the result is float
        return 0
    if row.kind == "quantizer":
        return int(TensorProto.UINT8)
    return known.get(node.input[row.operands[0].value or 0], 0)
