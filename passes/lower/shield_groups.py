"""Keeps ONNX Runtime from fusing operators with per-channel quantizers of activations.

    DequantizeLinear(x, [s]) → MatMul   →   DequantizeLinear(x, [s]) → Sum → MatMul
    MatMul → QuantizeLinear(y, [s])     →   MatMul → Sum → QuantizeLinear(y, [s])

ONNX Runtime 1.31 turns MatMul, Add and Mul between Q/DQ nodes into MatMulIntegerToFloat,
QLinearMatMul, QLinearAdd and QLinearMul without looking at the scales; those take one scale only,
and the model then fails to load ("Scale and Zero-point must be a scalar") or to run. Sum of one
operand is the identity (ONNX Sum, 1 to n inputs) and, unlike Identity, no optimizer removes it.
Weights are left alone: the fusions support one scale per output channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Tensor, is_constant, is_op, rank
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class _Match:
    """A tensor to insert a Sum after, and the inputs that will read the Sum, by node and slot."""

    tensor: Tensor
    suffix: str
    uses: list[tuple[Node, int]]


@dataclass(frozen=True)
class ShieldGroups(NodeRewrite[_Match]):
    """Insert a Sum between operators and the per-channel Q/DQ nodes of activations."""

    name: ClassVar[str] = "shield-groups"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("QuantizeLinear", "DequantizeLinear")

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | None:
        if not rank(node.inputs[1]):
            return None
        if is_op(node, "QuantizeLinear"):  # only the quantizer reads the Sum
            producer = graph.producer(node.inputs[0])
            shielded = producer is None or is_op(producer, "Sum")
            return None if shielded else _Match(node.inputs[0], "summed", [(node, 0)])
        out = node.outputs[0]
        readers = [(n, i) for n in graph.consumers(out) for i, t in enumerate(n.inputs) if t is out]
        shielded = all(is_op(n, "Sum") and len(n.inputs) == 1 for n, _ in readers)
        return None if shielded or is_constant(node.inputs[0]) else _Match(out, "shielded", readers)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        tensor = match.tensor
        shield = graph.add("Sum", [tensor], [f"{tensor.name}/{match.suffix}"], like=tensor)
        for reader, i in match.uses:
            graph.set_input(reader, i, shield.outputs[0])
