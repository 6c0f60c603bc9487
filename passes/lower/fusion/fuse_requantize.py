"""Lets an integer product write integers where nobody reads its float result.

    QuantizeLinear(MatMulIntegerToFloat(a, b, s, t, z, y), u, v)
        →   QLinearMatMul(a, s, z, b, t, y, u, v)

Saves writing and reading the result as float. Refuses products with a bias, which QLinearMatMul
has no operand for. Rounding: the operator multiplies by s·t/u where the pair multiplied by s·t and
divided by u, so values that lie half way between two integers may fall to either. Source: ONNX
QLinearMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Refusal, scalar
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class FuseRequantize(NodeRewrite[tuple[Node, Node]]):
    """Fuse a quantizer into the integer product before it."""

    name: ClassVar[str] = "fuse-requantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("lower-linears", "lower-products", "hoist-quantize")
    ops: ClassVar[tuple[str, ...]] = ("QuantizeLinear",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the quantizer, the product before it)."""
        product = graph.producer(node.inputs[0], "com.microsoft.MatMulIntegerToFloat")
        if product is None:
            return None
        return _obstacle(graph, node, product) or (node, product)

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        quantizer, product = match
        a, b, s, t, z, y = product.inputs[:6]
        u, v = quantizer.inputs[1:3]
        inputs = [a, s, z, b, t, y, u, v]
        graph.substitute(quantizer.outputs[0], "QLinearMatMul", inputs, "product")


def _obstacle(graph: Graph, quantizer: Node, product: Node) -> Refusal | None:
    if graph.only_consumer(product.outputs[0]) is None:
        return Refusal("the float result has other readers")
    if len(product.inputs) > 6 and product.inputs[6].name:
        return Refusal("the product adds a bias")
    if len(product.inputs) < 6 or not all(t.name for t in product.inputs[4:6]):
        return Refusal("the product has no zero points")
    if len(quantizer.inputs) < 3 or any(scalar(t) is None for t in quantizer.inputs[1:]):
        return Refusal("the quantizer has no constant scale and zero point for the whole tensor")
    if quantizer.inputs[2].dtype != product.inputs[0].dtype:
        return Refusal("the integers that it writes are not of the type that it reads")
    return None
