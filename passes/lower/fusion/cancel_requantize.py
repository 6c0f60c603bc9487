"""Removes a quantizer whose result equals the values that were dequantized before it.

    QuantizeLinear(DequantizeLinear(q, s, z), s, z)   →   q

Bit-equal: ``(q - z)·s / s`` rounds to the integer ``q - z``. Between layers that share a range,
tensors then stay int8. Refuses pairs that differ in scale, zero point or type (that is a
requantization), and scales that are not constant.
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
    """Remove DequantizeLinear and QuantizeLinear with the same parameters in sequence."""

    name: ClassVar[str] = "cancel-requantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "quantize-parts", "hoist-quantize")
    ops: ClassVar[tuple[str, ...]] = ("QuantizeLinear",)

    def match(
        self, graph: Graph, ctx: Context, node: Node
    ) -> tuple[Tensor, Tensor] | Refusal | None:
        """(the quantized tensor, the equal one before the dequantizer)."""
        dequantizer = graph.producer(node.inputs[0], "DequantizeLinear")
        if dequantizer is None:
            return None
        return _obstacle(graph, node, dequantizer) or (node.outputs[0], dequantizer.inputs[0])

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Tensor, Tensor]) -> None:
        graph.replace_uses(*match)


def _obstacle(graph: Graph, quantizer: Node, dequantizer: Node) -> Refusal | None:
    new, old = quantizer.inputs[1:], dequantizer.inputs[1:]
    if len(new) != 2 or len(old) != 2 or not all(is_constant(t) for t in (*new, *old)):
        return Refusal("scale or zero point is left out, or not constant")
    pairs = [(array(a), array(b)) for a, b in zip(new, old, strict=True)]
    same = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    if not same or quantizer.attrs.get("axis", 1) != dequantizer.attrs.get("axis", 1):
        return Refusal("its parameters differ from the dequantizer's: it requantizes")
    if graph.is_output(quantizer.outputs[0]):
        return Refusal("its quantized result is a graph output")
    return None
