"""Shared by the passes on convolutions: which activation a quantized convolution includes.

A quantized convolution clips its sums to the range of its result. A Relu or Clip that does no more
than the quantizer after it is redundant, so the convolution can write the quantized result.
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
_HALF_STEP = 0.51  # zero points are rounded, so saturation may start half a step beyond a bound


def result(graph: Graph, tensor: Tensor) -> Tensor:
    """The tensor to quantize for a result: that of the Relu or Clip after it, if any."""
    reader = graph.only_consumer(tensor)
    return tensor if reader is None or bounds(reader) is None else reader.outputs[0]


def bounds(node: Node) -> tuple[float, float] | None:
    """Bounds of a Relu, or of a Clip whose interval includes 0; None for anything else."""
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
    """True where a per-tensor quantizer clips at least as much as the Relu or Clip before it."""
    limits, step = bounds(node), scalar(quantizer.inputs[1])
    zero = quantizer.inputs[2] if len(quantizer.inputs) > 2 else None
    if limits is None or step is None or zero is None or not is_constant(zero):
        return False
    limits_q, point = np.iinfo(zero.dtype), int(array(zero).reshape(-1)[0])
    low, high = (limits_q.min - point) * step, (limits_q.max - point) * step
    margin = _HALF_STEP * step
    return bool(low >= limits[0] - margin and high <= limits[1] + margin)


def quantized_result(graph: Graph, node: Node) -> Node | Refusal:
    """The quantizer of an operator's result, or why the operator cannot write quantized values.

    A Relu or Clip in between must clip no more than the quantizer.
    """
    reader = graph.only_consumer(node.outputs[0])
    activation = reader if reader is not None and bounds(reader) is not None else None
    if activation is not None:
        reader = graph.only_consumer(activation.outputs[0])
    if reader is None or not is_op(reader, "QuantizeLinear"):
        return Refusal("its result is not quantized, or has other readers")
    if not is_plain(reader):
        return Refusal("its result is not uint8 with one constant float32 scale and a zero point")
    if activation is not None and not saturates(activation, reader):
        return Refusal("the activation after it clips more than its quantizer does")
    if graph.is_output(reader.outputs[0]):
        return Refusal("its quantized result is a graph output")
    return reader


def is_plain(node: Node) -> bool:
    """True for a per-tensor quantizer or dequantizer as QLinear operators accept it: constant
    parameters, uint8, and a float32 scale."""
    if len(node.inputs) < 3 or any(scalar(t) is None for t in node.inputs[1:3]):
        return False
    return bool(node.inputs[1].dtype == np.float32 and node.inputs[2].dtype == np.uint8)


def channels_first(graph: Graph) -> set[str]:
    """Names of tensors whose channels are axis 1, as in [batch, channels, height, width].

    From convolutions and pools, propagated both ways through operators that keep the axes.
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
