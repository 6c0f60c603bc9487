"""Turns quantized convolutions into QLinearConv, which reads and writes int8.

    QuantizeLinear(Relu(Conv(DQ(xq, s, z), DQ(Wq, t), b)), u, v)
        →   QLinearConv(xq, s, z, Wq, t, 0, u, v, round(b / (s·t)))

Relu and Clip are removed where the quantizer saturates at the same bounds. Where a bias divided by
its scale ``s·t`` would not fit int32, t is made larger: weights are then rounded more coarsely, but
they are negligible next to such a bias. Refuses weights that are not symmetric int8 per output
channel, activations other than uint8 with one constant scale, biases that are not constant, and
results that are not quantized, or after a Relu or Clip with other bounds. Rounding: a value half
way between two integers may be rounded to either. Source: ONNX QLinearConv.
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

_LARGEST_BIAS = 2.0**30  # half of int32, which also holds the sum of products


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
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "hoist-quantize", "cancel-requantize")
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
        bias = next((constant_bias(graph, b) for b in match.node.inputs[2:] if b.name), None)
        biases: list[Tensor] = []
        if bias is not None:
            w, t, int32_bias = _with_bias(graph, ctx, w, t, array(s).reshape(()), bias)
            biases = [int32_bias]
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
    if any(t.name and bias_values(graph, t) is None for t in node.inputs[2:]):
        return Refusal("the bias is not constant")
    if not is_plain(data):
        reason = "the data is not uint8 with one constant float32 scale and a zero point"
        return Refusal(reason)
    return None


def _with_bias(
    graph: Graph, ctx: Context, w: Tensor, t: Tensor, step: Array, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and scales with which the bias fits int32, and the bias as int32."""
    values, scales = array(bias).astype(np.float64), array(t).astype(np.float64)
    # the factor by which each channel's scale must grow for the bias to fit
    growth = np.maximum(np.abs(values) / (_LARGEST_BIAS * float(step) * scales), 1.0)
    if (growth > 1).any():
        per_output = growth.reshape(-1, *[1] * (array(w).ndim - 1))
        smaller = np.rint(array(w) / per_output).astype(np.int8)
        coarser = graph.constant(f"{w.name}/fewer", smaller)
        larger = graph.constant(f"{t.name}/larger", (scales * growth).astype(np.float32))
        for new, old in ((coarser, w), (larger, t)):
            ctx.origins[new.name] = ctx.origins.get(old.name, (old.name, None))
        w, t, scales = coarser, larger, array(larger).astype(np.float64)
    rounded = np.clip(np.rint(values / (float(step) * scales)), -(2**31), 2**31 - 1)
    int32_bias = graph.constant(f"{bias.name}/int32", rounded.astype(np.int32))
    ctx.origins[int32_bias.name] = (bias.name, None)
    return w, t, int32_bias
