"""Fuses a quantizer into the int8 matrix multiplication before it, which then writes int8.

    QuantizeLinear(MatMulIntegerToFloat(a, b, s, t, z, y), u, v)
        →   QLinearMatMul(a, s, z, b, t, y, u, v)

Saves writing and reading the result as float. Refuses a bias, which QLinearMatMul has no input for.
Rounding: the operator multiplies by s·t/u where the two nodes multiplied by s·t and divided by u,
so a value half way between two integers may be rounded to either. Source: ONNX QLinearMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Refusal, scalar
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class FuseRequantize(NodeRewrite[tuple[Node, Node]]):
    """Fuse a quantizer into the int8 matrix multiplication before it."""

    name: ClassVar[str] = "fuse-requantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("lower-linears", "lower-products", "hoist-quantize")
    ops: ClassVar[tuple[str, ...]] = ("QuantizeLinear",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the quantizer, the MatMulIntegerToFloat before it)."""
        matmul = graph.producer(node.inputs[0], "com.microsoft.MatMulIntegerToFloat")
        if matmul is None:
            return None
        return _obstacle(graph, node, matmul) or (node, matmul)

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        quantizer, matmul = match
        a, b, s, t, z, y = matmul.inputs[:6]
        u, v = quantizer.inputs[1:3]
        inputs = [a, s, z, b, t, y, u, v]
        graph.substitute(quantizer.outputs[0], "QLinearMatMul", inputs, "product")


def _obstacle(graph: Graph, quantizer: Node, matmul: Node) -> Refusal | None:
    if graph.only_consumer(matmul.outputs[0]) is None:
        return Refusal("the float result has other readers")
    if len(matmul.inputs) > 6 and matmul.inputs[6].name:
        return Refusal("the matrix multiplication adds a bias")
    if len(matmul.inputs) < 6 or not all(t.name for t in matmul.inputs[4:6]):
        return Refusal("the matrix multiplication has no zero points")
    if len(quantizer.inputs) < 3 or any(scalar(t) is None for t in quantizer.inputs[1:]):
        return Refusal("the quantizer has no constant scale and zero point for the whole tensor")
    if quantizer.inputs[2].dtype != matmul.inputs[0].dtype:
        return Refusal("the quantizer's type is not the type of the left operand")
    return None
