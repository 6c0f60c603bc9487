"""Turns a sum between integers into ONNX Runtime's QLinearAdd.

    QuantizeLinear(Relu(Add(DQ(a, s, z), DQ(b, t, y))), u, v)
        →   QLinearAdd(a, s, z, b, t, y, u, v)

Residual sums of convolutions: as a float Add they would turn two tensors to float and one back.
Relu and Clip vanish where the integers end where they would cut. Refuses operands that are not
uint8 with one constant float32 scale, and results that are not quantized or not cut alike; an Add
with a float operand is none of its. Rounding: the operator rounds once what the pair rounded twice,
so values half way between two integers may fall to either. Source: ONNX Runtime com.microsoft
QLinearAdd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import MICROSOFT, Graph, Node, is_op
from qcompile.ir.analysis.conv_activation import Quantized, is_plain, quantized_result
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class LowerSums(Pass):
    """Lower Q/DQ sums to QLinearAdd."""

    name: ClassVar[str] = "lower-sums"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "hoist-quantize", "cancel-requantize")

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            makers = [graph.producer(t) for t in node.inputs] if is_op(node, "Add") else []
            operands = [m for m in makers if m is not None and is_op(m, "DequantizeLinear")]
            if len(operands) != 2:
                continue
            found = quantized_result(graph, node)
            reason = found if isinstance(found, str) else None
            if not all(is_plain(operand) for operand in operands):
                reason = "an operand is not uint8 with one constant float32 scale and a zero point"
            if reason is None and isinstance(found, Quantized):
                _lower(graph, node, operands, found)
                changed = True
            elif reason is not None:
                ctx.skip(node, reason)
        return bool(graph.remove_dead()) or changed


def _lower(graph: Graph, node: Node, operands: list[Node], found: Quantized) -> None:
    inputs = [t for operand in operands for t in operand.inputs[:3]]
    out = found.quantizer.outputs[0]
    lowered = graph.add(
        "QLinearAdd",
        [*inputs, *found.quantizer.inputs[1:3]],
        [f"{out.name}/sum"],
        domain=MICROSOFT,
        name=f"{node.name}/int8",
        like=out,
    )
    graph.replace_uses(out, lowered.outputs[0])
