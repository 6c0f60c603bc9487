"""Keeps ONNX Runtime's fusions away from activations with a scale for each channel.

    DequantizeLinear(x, [s]) → MatMul   →   DequantizeLinear(x, [s]) → Sum → MatMul
    MatMul → QuantizeLinear(y, [s])     →   MatMul → Sum → QuantizeLinear(y, [s])

ONNX Runtime 1.31 turns MatMul, Add and Mul between Q/DQ nodes into MatMulIntegerToFloat,
QLinearMatMul, QLinearAdd and QLinearMul without looking at the scales; those take one scale only,
and the model then fails to load ("Scale and Zero-point must be a scalar") or to run. Sum of one
operand is the identity (ONNX Sum, 1 to n inputs) and, other than Identity, no optimizer removes it.
Weights are left alone: a scale for each output channel is what the fusions expect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, is_constant, is_op, rank
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class ShieldGroups(Pass):
    """Put a Sum between operators and the Q/DQ of activations with scales per channel."""

    name: ClassVar[str] = "shield-groups"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if not is_op(node, "QuantizeLinear", "DequantizeLinear") or not rank(node.inputs[1]):
                continue
            if is_op(node, "DequantizeLinear") and not is_constant(node.inputs[0]):
                changed |= _shield_readers(graph, node)
            elif is_op(node, "QuantizeLinear"):
                changed |= _shield_maker(graph, node)
        return changed


def _shield_readers(graph: Graph, node: Node) -> bool:
    out = node.outputs[0]
    readers = [(n, i) for n in graph.consumers(out) for i, t in enumerate(n.inputs) if t is out]
    if not readers or all(is_op(n, "Sum") and len(n.inputs) == 1 for n, _ in readers):
        return False
    shielded = graph.add("Sum", [out], [f"{out.name}/shielded"], like=out).outputs[0]
    for reader, i in readers:
        graph.set_input(reader, i, shielded)
    return True


def _shield_maker(graph: Graph, node: Node) -> bool:
    """A Sum in front of a quantizer, of its own: other readers keep what they read."""
    tensor = node.inputs[0]
    maker = graph.producer(tensor)
    if maker is None or is_op(maker, "Sum"):
        return False
    summed = graph.add("Sum", [tensor], [f"{tensor.name}/summed"], like=tensor)
    graph.set_input(node, 0, summed.outputs[0])
    return True
