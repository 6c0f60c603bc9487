"""Turns quantized convolutions into QLinearConv, which reads and writes int8.

    QuantizeLinear(Relu(Conv(DQ(xq, s, z), DQ(Wq, t), b)), u, v)
        →   QLinearConv(xq, s, z, Wq, t, 0, u, v, round(b / (s·t)))

Relu and Clip are removed where the quantizer saturates at the same bounds. Refuses weights that are
not symmetric int8 per output channel, activations other than uint8 with one constant scale, biases
that are not constant or do not fit int32 (``fit-biases`` makes those of ours fit), and results that
are not quantized, or after a Relu or Clip with other bounds. Rounding: a value half way between two
integers may be rounded to either. Source: ONNX QLinearConv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_zero, rank
from qcompile.ir.analysis.conv_activation import is_plain, quantized_result
from qcompile.ir.analysis.prequantized import bias_values, constant_bias
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_LARGEST_BIAS = 2**31 - 1


@dataclass(frozen=True)
class _Match:
    """A Conv, the DequantizeLinear nodes of its operands, and the quantizer of its result."""

    node: Node
    data: Node
    weight: Node
    quantizer: Node


@dataclass(frozen=True)
class LowerConvolutions(NodeRewrite[_Match]):
    """Lower Q/DQ convolutions to QLinearConv."""

    name: ClassVar[str] = "lower-convolutions"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = (
        "insert-qdq",
        "hoist-quantize",
        "cancel-requantize",
        "fit-biases",
    )
    ops: ClassVar[tuple[str, ...]] = ("Conv",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        data, weight = (graph.producer(t, "DequantizeLinear") for t in node.inputs[:2])
        if data is None or weight is None:
            return None  # nothing was planned
        obstacle = _obstacle(graph, node, data, weight)
        if obstacle is not None:
            return obstacle
        quantizer = quantized_result(graph, node)
        if isinstance(quantizer, Refusal):
            return quantizer
        return _Match(node, data, weight, quantizer)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        x, s, z = match.data.inputs[:3]
        u, v = match.quantizer.inputs[1:3]
        w, t = match.weight.inputs[:2]
        given = [constant_bias(graph, b) for b in match.node.inputs[2:] if b.name]
        biases = [_int32_bias(graph, ctx, match.data, match.weight, b) for b in given]
        zero = graph.constant(f"{w.name}/zero_point", np.zeros(array(t).shape, np.int8))
        ctx.origins[zero.name] = ctx.origins.get(w.name, (w.name, None))
        graph.substitute(
            match.quantizer.outputs[0],
            "QLinearConv",
            [x, s, z, w, t, zero, u, v, *biases],
            "convolution",
            match.node.attrs,
            name=f"{match.node.name}/int8",
        )


def _obstacle(graph: Graph, node: Node, data: Node, weight: Node) -> Refusal | None:
    kernel, scale = weight.inputs[:2]
    if not is_constant(kernel) or kernel.dtype != np.int8:
        return Refusal("the weight is not an int8 constant")
    if not all(is_zero(t) for t in weight.inputs[2:]):
        return Refusal("the weight is not symmetric")
    by_output = rank(scale) == 0 or (rank(scale) == 1 and weight.attrs.get("axis", 1) == 0)
    if not is_constant(scale) or not by_output:
        return Refusal("the weight's scales are not along the output channels")
    if not is_plain(data):
        reason = "the data is not uint8 with one constant float32 scale and a zero point"
        return Refusal(reason)
    for values in (bias_values(graph, t) for t in node.inputs[2:] if t.name):
        if values is None:
            return Refusal("the bias is not constant")
        if np.abs(_steps(data, weight, values)).max(initial=0) > _LARGEST_BIAS:
            return Refusal("the bias does not fit int32 (fit-biases makes it fit)")
    return None


def _int32_bias(graph: Graph, ctx: Context, data: Node, weight: Node, bias: Tensor) -> Tensor:
    whole = _steps(data, weight, array(bias)).astype(np.int32)
    constant = graph.constant(f"{bias.name}/int32", whole)
    ctx.origins[constant.name] = (bias.name, None)
    return constant


def _steps(data: Node, weight: Node, bias: Array) -> Array:
    """A bias (outputs,) in steps of the sums, whole numbers in float64."""
    step = array(data.inputs[1]).reshape(()).astype(np.float64)
    steps: Array = np.rint(bias / (step * array(weight.inputs[1])))
    return steps
