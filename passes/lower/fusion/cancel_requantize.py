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

from qcompile.ir import Graph, Node, array, is_constant, is_op
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class CancelRequantize(Pass):
    """Join integers that were dequantized and quantized again with the same parameters."""

    name: ClassVar[str] = "cancel-requantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "quantize-parts", "hoist-quantize")

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if not is_op(node, "QuantizeLinear"):
                continue
            maker = graph.producer(node.inputs[0])
            if maker is None or not is_op(maker, "DequantizeLinear"):
                continue
            reason = _obstacle(graph, node, maker)
            if reason is None:
                graph.replace_uses(node.outputs[0], maker.inputs[0])
                changed = True
            else:
                ctx.skip(node, reason)
        return bool(graph.remove_dead()) or changed


def _obstacle(graph: Graph, quantizer: Node, dequantizer: Node) -> str | None:
    mine, its = quantizer.inputs[1:], dequantizer.inputs[1:]
    if len(mine) != 2 or len(its) != 2 or not all(is_constant(t) for t in (*mine, *its)):
        return "scale or zero point is left out, or not constant"
    pairs = [(array(a), array(b)) for a, b in zip(mine, its, strict=True)]
    same = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    if not same or quantizer.attrs.get("axis", 1) != dequantizer.attrs.get("axis", 1):
        return "it has other parameters than its integers: it requantizes"
    if graph.is_output(quantizer.outputs[0]):
        return "its integers are a graph output"
    return None
