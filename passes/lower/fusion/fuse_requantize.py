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

from qcompile.ir import Graph, Node, is_op, scalar
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class FuseRequantize(Pass):
    """Fuse a quantizer into the integer product before it."""

    name: ClassVar[str] = "fuse-requantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("lower-linears", "lower-products", "hoist-quantize")

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for quantizer in graph.nodes:
            if not is_op(quantizer, "QuantizeLinear"):
                continue
            product = graph.producer(quantizer.inputs[0])
            if product is None or not is_op(product, "com.microsoft.MatMulIntegerToFloat"):
                continue
            reason = _obstacle(graph, quantizer, product)
            if reason is None:
                _fuse(graph, quantizer, product)
                changed = True
            else:
                ctx.skip(quantizer, reason)
        return bool(graph.remove_dead()) or changed


def _obstacle(graph: Graph, quantizer: Node, product: Node) -> str | None:
    if graph.only_consumer(product.outputs[0]) is None:
        return "the float result has other readers"
    if len(product.inputs) > 6 and product.inputs[6].name:
        return "the product adds a bias"
    if len(product.inputs) < 6 or not all(t.name for t in product.inputs[4:6]):
        return "the product has no zero points"
    if len(quantizer.inputs) < 3 or any(scalar(t) is None for t in quantizer.inputs[1:]):
        return "the quantizer has no constant scale and zero point for the whole tensor"
    if quantizer.inputs[2].dtype != product.inputs[0].dtype:
        return "the integers that it writes are not of the type that it reads"
    return None


def _fuse(graph: Graph, quantizer: Node, product: Node) -> None:
    a, b, s, t, z, y = product.inputs[:6]
    u, v = quantizer.inputs[1:3]
    out = quantizer.outputs[0]
    name = f"{out.name}/product"
    fused = graph.add("QLinearMatMul", [a, s, z, b, t, y, u, v], [name], like=out)
    graph.replace_uses(out, fused.outputs[0])
