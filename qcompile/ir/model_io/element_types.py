"""Element types of a graph's tensors, as far as they are declared or an operator's rules tell.

Compiled models declare few of their inner tensors, and which integers an operand has decides which
kernel of ONNX Runtime multiplies it.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

# Operators that pass on the type of their first operand.
_MOVERS = (
    "Clip", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "MaxPool", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
)  # fmt: skip
# Operators whose results have the type of the zero point in this slot.
_BY_ZERO_POINT = {
    "QGemm": 8, "QLinearAdd": 7, "QLinearConcat": 1, "QLinearConv": 7, "QLinearMatMul": 7,
    "QLinearMul": 7, "QLinearSigmoid": 4, "QLinearSoftmax": 4, "QuantizeLinear": 2,
}  # fmt: skip


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
    if node.op_type in _MOVERS:
        return known.get(node.input[0], 0)
    if node.op_type == "Where":
        return known.get(node.input[1], 0)
    slot = _BY_ZERO_POINT.get(node.op_type)
    if slot is None:
        return 0
    declared = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), 0)
    if declared:
        return int(declared)
    zero = node.input[slot] if len(node.input) > slot else ""
    if node.op_type == "QGemm" and not zero:  # without an output scale the result is float
        return 0
    return known.get(zero, 0) if zero else int(TensorProto.UINT8)
