"""Turns a sum of quantized tensors into ONNX Runtime's QLinearAdd.

    QuantizeLinear(Relu(Add(DQ(a, s, z), DQ(b, t, y))), u, v)
        →   QLinearAdd(a, s, z, b, t, y, u, v)

For residual sums of convolutions: a float Add would dequantize two tensors and quantize one. Relu
and Clip are removed where the quantizer saturates at the same bounds. Refuses operands that are not
uint8 with one constant float32 scale, and results that are not quantized, or after a Relu or Clip
with other bounds; ignores an Add with a float operand. Rounding: the operator rounds once where the
nodes rounded twice, so a value half way between two integers may be rounded to either. Source: ONNX
Runtime com.microsoft QLinearAdd.
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
    """A sum, the DequantizeLinear nodes of its operands, and the quantizer of its result."""

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
        dequantizers = (graph.producer(t, "DequantizeLinear") for t in node.inputs)
        operands = [d for d in dequantizers if d is not None]
        if len(operands) != 2:
            return None
        if not all(map(is_plain, operands)):
            reason = "an operand is not uint8 with one constant float32 scale and a zero point"
            return Refusal(reason)
        quantizer = quantized_result(graph, node)
        if isinstance(quantizer, Refusal):
            return quantizer
        return _Match(node, operands, quantizer)

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
