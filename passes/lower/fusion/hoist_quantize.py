"""Moves quantizers before layout operators, which then move a quarter of the bytes.

    QuantizeLinear(Reshape(Transpose(x)), s, z)   →   Reshape(Transpose(QuantizeLinear(x, s, z)))

Bit-equal: with one scale per tensor, quantizing and moving values commute; the same is true of
DynamicQuantizeLinear, whose minimum and maximum do not depend on the order. Quantization is
monotonic, so MaxPool, which selects values, commutes with QuantizeLinear too. Refuses per-channel
scales and quantized graph outputs; leaves layout operators with other readers where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Refusal, is_constant, is_op
from qcompile.ir.analysis.data_path import movers_before
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class HoistQuantize(NodeRewrite[tuple[Node, list[Node]]]):
    """Move quantizers before layout operators."""

    name: ClassVar[str] = "hoist-quantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "lower-linears")
    ops: ClassVar[tuple[str, ...]] = ("QuantizeLinear", "DynamicQuantizeLinear")

    def match(
        self, graph: Graph, ctx: Context, node: Node
    ) -> tuple[Node, list[Node]] | Refusal | None:
        """(the quantizer, the layout operators before it, nearest first)."""
        selecting = ("MaxPool",) if is_op(node, "QuantizeLinear") else ()
        chain = movers_before(graph, node.inputs[0], selecting)
        if not chain:
            return None
        if "axis" in node.attrs or any(t.shape for t in node.inputs[1:] if is_constant(t)):
            return Refusal("its scales are per axis, which layout operators would move")
        if graph.is_output(node.outputs[0]):
            return Refusal("it carries the name of a graph output")
        return node, chain

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, list[Node]]) -> None:
        quantizer, chain = match
        first, last = chain[-1], chain[0]
        source, result = first.inputs[0], quantizer.outputs[0]
        for node in chain:  # their outputs are int8 now, so they get new names
            graph.renew_output(node, "quantized", result.dtype)
        graph.replace_uses(result, last.outputs[0])  # readers use the moved int8 values
        graph.set_input(quantizer, 0, source)
        graph.set_input(first, 0, result)
        result.shape = source.shape
