"""Removes a quantizer that gives back the integers it came from.

    QuantizeLinear(DequantizeLinear(q, s, z), s, z)   →   q

Bit-equal: ``(q - z)·s / s`` is within rounding of the integer ``q - z``. Between layers that share
a range this leaves integers all the way. Refuses pairs that differ in scale, zero point or type
(that is a requantization), and scales that are not constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class CancelRequantize(NodeRewrite[tuple[Tensor, Tensor]]):
    """Join integers that were dequantized and quantized again with the same parameters."""

    name: ClassVar[str] = "cancel-requantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "quantize-parts", "hoist-quantize")
    ops: ClassVar[tuple[str, ...]] = ("QuantizeLinear",)

    def match(
        self, graph: Graph, ctx: Context, node: Node
    ) -> tuple[Tensor, Tensor] | Refusal | None:
        """(integers, the integers that they came from)."""
        maker = graph.producer(node.inputs[0], "DequantizeLinear")
        if maker is None:
            return None
        return _obstacle(graph, node, maker) or (node.outputs[0], maker.inputs[0])

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Tensor, Tensor]) -> None:
        graph.replace_uses(*match)


def _obstacle(graph: Graph, quantizer: Node, dequantizer: Node) -> Refusal | None:
    mine, its = quantizer.inputs[1:], dequantizer.inputs[1:]
    if len(mine) != 2 or len(its) != 2 or not all(is_constant(t) for t in (*mine, *its)):
        return Refusal("scale or zero point is left out, or not constant")
    pairs = [(array(a), array(b)) for a, b in zip(mine, its, strict=True)]
    same = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    if not same or quantizer.attrs.get("axis", 1) != dequantizer.attrs.get("axis", 1):
        return Refusal("it has other parameters than its integers: it requantizes")
    if graph.is_output(quantizer.outputs[0]):
        return Refusal("its integers are a graph output")
    return None
