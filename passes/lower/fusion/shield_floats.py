"""Keeps ONNX Runtime from quantizing weights that were left float.

    Q(ConvTranspose(DQ(x, s, z), W))   →   Q(ConvTranspose(Sum(DQ(x, s, z)), W))

Between a dequantizer and a quantizer ONNX Runtime rounds the float weight of a Conv, ConvTranspose
or Gemm to int8 with one scale, and its bias to int32, even if no integer kernel follows: what the
report calls float would not be. Where scales are float16, the bias of a quantized layer is shielded
too, also one that is added to a MatMul: ONNX Runtime computes ``round(bias / (s·t))`` in float16,
which is infinite for an ordinary bias, and no integer kernel would follow. Sum of one operand is
the identity, and no optimizer removes it (``shield-groups``). Source: ONNX Runtime
weight_bias_quantization.cc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Tensor, half_type, is_constant, is_float, is_op, scalar
from qcompile.ir.operators import CONVOLUTIONS
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_BIAS = 2  # input slot of Gemm and Conv


@dataclass(frozen=True)
class ShieldFloats(NodeRewrite[Node]):
    """Insert a Sum in front of float weights, and float16 biases, between Q/DQ nodes."""

    name: ClassVar[str] = "shield-floats"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = (
        "insert-qdq", "lower-convolutions", "dequantize-at-load", "halve-floats",
    )  # fmt: skip
    ops: ClassVar[tuple[str, ...]] = (*CONVOLUTIONS, "Gemm", "MatMul")

    def match(self, graph: Graph, ctx: Context, node: Node) -> Node | None:
        data = graph.producer(node.inputs[0], "DequantizeLinear")
        weight = node.inputs[1]
        if data is None or scalar(data.inputs[1]) is None:
            return None
        half = half_type(data.inputs[1]) is not None
        if is_op(node, "MatMul") and not half:
            return None
        left_float = (half or is_float(weight)) and _is_known_at_load(graph, weight)
        rounded = left_float or (half and _adds_bias(graph, node))
        return node if rounded and _is_quantized_next(graph, node) else None

    def rewrite(self, graph: Graph, ctx: Context, match: Node) -> None:
        data = match.inputs[0]
        shield = graph.add("Sum", [data], [f"{data.name}/shielded"], like=data)
        graph.set_input(match, 0, shield.outputs[0])


def _adds_bias(graph: Graph, node: Node) -> bool:
    if not is_op(node, "MatMul"):
        return len(node.inputs) > _BIAS and bool(node.inputs[_BIAS].name)
    add = graph.only_consumer(node.outputs[0], "Add")
    return add is not None and any(map(is_constant, add.inputs))


def _is_known_at_load(graph: Graph, tensor: Tensor) -> bool:
    """True for a constant, and for what ONNX Runtime folds to one: anything but a dequantizer."""
    maker = graph.producer(tensor)
    if maker is None or is_op(maker, "DequantizeLinear"):
        return is_constant(tensor)
    return all(_is_known_at_load(graph, t) for t in maker.inputs)


def _is_quantized_next(graph: Graph, node: Node) -> bool:
    """True where only a quantizer reads the result, perhaps after Relu, Clip, and what ONNX Runtime
    first folds into the weight."""
    made = node.outputs[0]
    reader = graph.only_consumer(made)
    while reader is not None and (is_op(reader, "Relu", "Clip") or _folds(graph, reader, made)):
        made = reader.outputs[0]
        reader = graph.only_consumer(made)
    return reader is not None and is_op(reader, "QuantizeLinear")


def _folds(graph: Graph, node: Node, data: Tensor) -> bool:
    """True for a node that ONNX Runtime folds into the weight and bias in front of it."""
    known = (_is_known_at_load(graph, t) for t in node.inputs if t is not data)
    return is_op(node, "Add", "BatchNormalization", "Mul") and all(known)
