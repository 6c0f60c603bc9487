"""Moves the DequantizeLinear of data behind the layout operators in front of a linear layer.

    MatMul(Flatten(DequantizeLinear(q, s, z)), DequantizeLinear(@w, t))
        →   MatMul(DequantizeLinear(Flatten(q), s, z), DequantizeLinear(@w, t))

Models that bring their quantizers have them where a tensor is made; ``lower-linears`` reads
integers where they are multiplied, and moving integers copies a quarter of the bytes. Bit-equal:
with one scale per tensor, moving and dequantizing commute. Refuses scales per channel; leaves
layout operators whose results have other readers, and layers whose weight is float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Refusal, rank
from qcompile.ir.analysis.data_path import movers_before
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class _Match:
    """A linear layer, the dequantizer of its data, and the operators in between, nearest first."""

    node: Node
    dequantizer: Node
    chain: list[Node]


@dataclass(frozen=True)
class SinkDequantize(NodeRewrite[_Match]):
    """Let linear layers read dequantized data directly."""

    name: ClassVar[str] = "sink-dequantize"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("Gemm", "MatMul")

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        if graph.producer(node.inputs[1], "DequantizeLinear") is None:
            return None
        chain = movers_before(graph, node.inputs[0])
        dequantizer = graph.producer(chain[-1].inputs[0], "DequantizeLinear") if chain else None
        if dequantizer is None:
            return None
        if any(rank(t) for t in dequantizer.inputs[1:]):
            return Refusal("the data has scales per channel")
        return _Match(node, dequantizer, chain)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        quantized, *parameters = match.dequantizer.inputs
        moved = match.node.inputs[0]
        graph.set_input(match.chain[-1], 0, quantized)
        for node in match.chain:  # their results are integers now, so they get new names
            graph.renew_output(node, "quantized", quantized.dtype)
        integers = match.node.inputs[0]
        name = f"{moved.name}/dequantized"
        operands = [integers, *parameters]
        new = graph.add("DequantizeLinear", operands, [name], like=moved)
        graph.set_input(match.node, 0, new.outputs[0])
