"""Turns quantized products of two activations into ONNX Runtime's integer product.

    MatMul(DQ(a, s, z), Transpose(DQ(b, t, y)))
        →   MatMulIntegerToFloat(a, Transpose(b), s, t, z, y)

Layout operators between a quantizer and the product move the integers, a quarter of the bytes.
Refuses all but uint8 on the left and int8 on the right, with one scale each: the other types have
no vector kernel. Source: ONNX Runtime matmul_integer_to_float, which takes batches on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import MICROSOFT, Graph, Node, Tensor, is_constant, is_op, scalar
from qcompile.ir.analysis.data_path import movers_before
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_TYPES = (np.uint8, np.int8)


@dataclass(frozen=True)
class LowerProducts(Pass):
    """Lower Q/DQ products of activations to MatMulIntegerToFloat."""

    name: ClassVar[str] = "lower-products"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if not is_op(node, "MatMul") or any(is_constant(t) for t in node.inputs):
                continue
            sides = [_side(graph, t) for t in node.inputs]
            if any(side is None for side in sides):
                continue
            left, right = (s for s in sides if s is not None)
            reason = _obstacle(left, right)
            if reason is None:
                _lower(graph, node, left, right)
                changed = True
            else:
                ctx.skip(node, reason)
        return bool(graph.remove_dead()) or changed


@dataclass(frozen=True)
class _Side:
    """A DequantizeLinear, and what moves its values on the way to the product, nearest first."""

    dequantizer: Node
    movers: list[Node]


def _side(graph: Graph, tensor: Tensor) -> _Side | None:
    movers = movers_before(graph, tensor)
    source = movers[-1].inputs[0] if movers else tensor
    node = graph.producer(source)
    if node is None or not is_op(node, "DequantizeLinear") or is_constant(node.inputs[0]):
        return None
    return _Side(node, movers)


def _obstacle(left: _Side, right: _Side) -> str | None:
    for side, dtype in zip((left, right), _TYPES, strict=True):
        quantized, scale = side.dequantizer.inputs[:2]
        if quantized.dtype != dtype:
            return f"operands are not uint8 and int8 but {quantized.dtype} is among them"
        if scalar(scale) is None:
            return "an operand has a scale per channel, or one that is not constant"
        if len(side.dequantizer.inputs) < 3:
            return "an operand has no zero point"
    return None


def _lower(graph: Graph, node: Node, left: _Side, right: _Side) -> None:
    result = node.outputs[0]
    (a, s, z), (b, t, y) = left.dequantizer.inputs[:3], right.dequantizer.inputs[:3]
    lowered = graph.add(
        "MatMulIntegerToFloat",
        [_moved(graph, left, a), _moved(graph, right, b), s, t, z, y],
        [f"{result.name}/int8"],
        domain=MICROSOFT,
        name=f"{node.name}/int8",
        like=result,
    )
    graph.replace_uses(result, lowered.outputs[0])


def _moved(graph: Graph, side: _Side, quantized: Tensor) -> Tensor:
    """The integers after the movers, which carried floats before."""
    if not side.movers:
        return quantized
    for mover in side.movers:
        graph.renew_output(mover, "quantized", quantized.dtype)
    graph.set_input(side.movers[-1], 0, quantized)
    return side.movers[0].outputs[0]
