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

from qcompile.ir import MICROSOFT, Graph, Node, Refusal
from qcompile.ir.analysis.conv_activation import is_plain, quantized_result
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class _Match:
    """A sum, what dequantizes its operands, and what quantizes its result."""

    node: Node
    operands: list[Node]
    quantizer: Node


@dataclass(frozen=True)
class LowerSums(NodeRewrite[_Match]):
    """Lower Q/DQ sums to QLinearAdd."""

    name: ClassVar[str] = "lower-sums"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "hoist-quantize", "cancel-requantize")
    ops: ClassVar[tuple[str, ...]] = ("Add",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        made = (graph.producer(t, "DequantizeLinear") for t in node.inputs)
        operands = [maker for maker in made if maker is not None]
        if len(operands) != 2:
            return None
        if not all(map(is_plain, operands)):
            reason = "an operand is not uint8 with one constant float32 scale and a zero point"
            return Refusal(reason)
        found = quantized_result(graph, node)
        return found if isinstance(found, Refusal) else _Match(node, operands, found)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        inputs = [t for operand in match.operands for t in operand.inputs[:3]]
        graph.substitute(
            match.quantizer.outputs[0],
            "QLinearAdd",
            [*inputs, *match.quantizer.inputs[1:3]],
            "sum",
            domain=MICROSOFT,
            name=f"{match.node.name}/int8",
        )
