"""Turns quantized matrix multiplications of two activations into MatMulIntegerToFloat.

    MatMul(DQ(a, s, z), Transpose(DQ(b, t, y)))
        →   MatMulIntegerToFloat(a, Transpose(b), s, t, z, y)

Layout operators between a quantizer and the MatMul then move int8 values, a quarter of the bytes.
Requires uint8 on the left and int8 on the right, with one scale each: other types have no vector
kernel. Source: ONNX Runtime matmul_integer_to_float, which takes batches on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import MICROSOFT, Graph, Node, Refusal, Tensor, is_constant, scalar
from qcompile.ir.analysis.data_path import movers_before
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_TYPES = (np.uint8, np.int8)


@dataclass(frozen=True)
class _Side:
    """A DequantizeLinear, and the layout operators between it and the MatMul, nearest first."""

    dequantizer: Node
    movers: list[Node]


@dataclass(frozen=True)
class _Match:
    """A MatMul and its operands."""

    node: Node
    left: _Side
    right: _Side


@dataclass(frozen=True)
class LowerProducts(NodeRewrite[_Match]):
    """Lower Q/DQ matrix multiplications of activations to MatMulIntegerToFloat."""

    name: ClassVar[str] = "lower-products"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("MatMul",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        if any(is_constant(t) for t in node.inputs):
            return None
        left, right = (_side(graph, t) for t in node.inputs)
        if left is None or right is None:
            return None
        return _obstacle(left, right) or _Match(node, left, right)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        left, right = match.left, match.right
        (a, s, z), (b, t, y) = left.dequantizer.inputs[:3], right.dequantizer.inputs[:3]
        graph.substitute(
            match.node.outputs[0],
            "MatMulIntegerToFloat",
            [_moved(graph, left, a), _moved(graph, right, b), s, t, z, y],
            "int8",
            domain=MICROSOFT,
            name=f"{match.node.name}/int8",
        )


def _side(graph: Graph, tensor: Tensor) -> _Side | None:
    movers = movers_before(graph, tensor)
    source = movers[-1].inputs[0] if movers else tensor
    node = graph.producer(source, "DequantizeLinear")
    if node is None or is_constant(node.inputs[0]):
        return None
    return _Side(node, movers)


def _obstacle(left: _Side, right: _Side) -> Refusal | None:
    for side, dtype in zip((left, right), _TYPES, strict=True):
        quantized, scale = side.dequantizer.inputs[:2]
        if quantized.dtype != dtype:
            return Refusal(f"operands are not uint8 and int8 but {quantized.dtype} is among them")
        if scalar(scale) is None:
            return Refusal("an operand has a scale per channel, or one that is not constant")
        if len(side.dequantizer.inputs) < 3:
            return Refusal("an operand has no zero point")
    return None


def _moved(graph: Graph, side: _Side, quantized: Tensor) -> Tensor:
    """The quantized values after the movers, which moved floats before."""
    if not side.movers:
        return quantized
    for mover in side.movers:
        graph.renew_output(mover, "quantized", quantized.dtype)
    graph.set_input(side.movers[-1], 0, quantized)
    return side.movers[0].outputs[0]
