"""What the passes on convolutions agree on: which activation becomes part of one, and its bounds.

An integer convolution ends by cutting its sums to the range of its result. Where Relu or Clip does
nothing else, it is part of the quantizer behind it, and the convolution writes what it would.
"""

from __future__ import annotations

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_op, rank, scalar
from qcompile.ir.operators import CONVOLUTIONS, ELEMENTWISE

_IMAGE_OPS = (
    *CONVOLUTIONS, "AveragePool", "BatchNormalization", "GlobalAveragePool", "GlobalMaxPool",
    "InstanceNormalization", "LRN", "MaxPool", "Upsample",
)  # fmt: skip
_KEEP_AXES = (*ELEMENTWISE, "Concat", "Pad", "Resize", "Slice")
_HALF_STEP = 0.51  # zero points are rounded: saturation may begin half a step beyond a bound


def result(graph: Graph, tensor: Tensor) -> Tensor:
    """What stands for a tensor in integers: what Relu or Clip makes of it, if that alone reads."""
    reader = graph.only_consumer(tensor)
    return tensor if reader is None or bounds(reader) is None else reader.outputs[0]


def bounds(node: Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Relu or Clip that leaves 0 as it is, None for anything else."""
    if is_op(node, "Relu"):
        return 0.0, np.inf
    if not is_op(node, "Clip"):
        return None
    low, high = float(node.attrs.get("min", -np.inf)), float(node.attrs.get("max", np.inf))
    for i, tensor in enumerate(node.inputs[1:3]):
        value = scalar(tensor) if tensor.name else (low, high)[i]
        if value is None:
            return None
        low, high = (value, high) if i == 0 else (low, value)
    return (low, high) if low <= 0 <= high else None


def saturates(node: Node, quantizer: Node) -> bool:
    """True where a quantizer for the whole tensor cuts off all that a Relu or Clip would."""
    limits, step = bounds(node), scalar(quantizer.inputs[1])
    zero = quantizer.inputs[2] if len(quantizer.inputs) > 2 else None
    if limits is None or step is None or zero is None or not is_constant(zero):
        return False
    held, point = np.iinfo(zero.dtype), int(array(zero).reshape(-1)[0])
    low, high = (held.min - point) * step, (held.max - point) * step
    margin = _HALF_STEP * step
    return bool(low >= limits[0] - margin and high <= limits[1] + margin)


def quantized_result(graph: Graph, node: Node) -> Node | Refusal:
    """The quantizer of an operator's result, or why it cannot write integers itself.

    Of a Relu or Clip in between the quantizer cuts off all that it would.
    """
    reader = graph.only_consumer(node.outputs[0])
    cut = reader if reader is not None and bounds(reader) is not None else None
    if cut is not None:
        reader = graph.only_consumer(cut.outputs[0])
    if reader is None or not is_op(reader, "QuantizeLinear"):
        return Refusal("its result is not quantized, or has other readers")
    if not is_plain(reader):
        return Refusal("its result is not uint8 with one constant float32 scale and a zero point")
    if cut is not None and not saturates(cut, reader):
        return Refusal("the activation behind it cuts deeper than the integers end")
    if graph.is_output(reader.outputs[0]):
        return Refusal("its integers are a graph output")
    return reader


def is_plain(node: Node) -> bool:
    """True for a quantizer, or what undoes one, with constant parameters for the whole tensor:
    uint8, and a scale in float32, which is all that the integer operators take."""
    if len(node.inputs) < 3 or any(scalar(t) is None for t in node.inputs[1:3]):
        return False
    return bool(node.inputs[1].dtype == np.float32 and node.inputs[2].dtype == np.uint8)


def channels_first(graph: Graph) -> set[str]:
    """Names of tensors whose channels are axis 1, as in [batch, channels, height, width].

    Found from convolutions and pools, and followed both ways through operators that keep the axes.
    """
    found: set[str] = set()
    for node in graph.nodes:
        if is_op(node, *_IMAGE_OPS):
            found |= {node.inputs[0].name, *(t.name for t in node.outputs)}
    while True:
        size = len(found)
        for node in (*graph.nodes, *reversed(graph.nodes)):
            names = {t.name for t in (*node.inputs, *node.outputs) if not is_constant(t)}
            if is_op(node, *_KEEP_AXES) and names & found:
                dims = rank(node.outputs[0])
                found |= {t.name for t in (*node.inputs, *node.outputs) if rank(t) == dims}
        if len(found) == size:
            return found
