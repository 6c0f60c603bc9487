"""Turns quantized convolutions into QLinearConv, which reads and writes integers.

    QuantizeLinear(Relu(Conv(DQ(xq, s, z), DQ(Wq, t), b)), u, v)
        →   QLinearConv(xq, s, z, Wq, t, 0, u, v, round(b / (s·t)))

Relu and Clip vanish where the integers end where they would cut. A bias that its channel's scale
``s·t`` would push out of int32 gets a larger t, which rounds weights that do not count beside it.
Refuses weights that are not symmetric int8 by output channel, activations other than uint8 with
one constant scale, biases that are not constant, and results that are not quantized or not cut
alike. Rounding: what lies half way between two integers may fall to either. Source: ONNX
QLinearConv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_op, is_zero, rank
from qcompile.ir.analysis.conv_activation import Quantized, is_plain, quantized_result
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import Numerics, Pass, Stage

_LARGEST_BIAS = 2.0**30  # half of int32: the sum of products is added to it


@dataclass(frozen=True)
class LowerConvolutions(Pass):
    """Lower Q/DQ convolutions to QLinearConv."""

    name: ClassVar[str] = "lower-convolutions"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "hoist-quantize", "cancel-requantize")

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            found = _find(graph, node) if is_op(node, "Conv") else None
            if found is None:
                continue
            reason = _obstacle(found)
            if reason is None:
                _lower(graph, ctx, found)
                changed = True
            else:
                ctx.skip(node, reason)
        return bool(graph.remove_dead()) or changed


@dataclass(frozen=True)
class _Convolution:
    """A Conv and what dequantizes its operands; ``result``: its quantizer, or why there is none."""

    node: Node
    data: Node
    weight: Node
    result: Quantized | str


def _find(graph: Graph, node: Node) -> _Convolution | None:
    """None where data or weight is float: nothing was planned."""
    data, weight = (graph.producer(t) for t in node.inputs[:2])
    if data is None or weight is None:
        return None
    if not all(is_op(n, "DequantizeLinear") for n in (data, weight)):
        return None
    return _Convolution(node, data, weight, quantized_result(graph, node))


def _obstacle(found: _Convolution) -> str | None:
    kernel, scale = found.weight.inputs[:2]
    if not is_constant(kernel) or kernel.dtype != np.int8:
        return "the weight is no int8 constant"
    if not all(is_zero(t) for t in found.weight.inputs[2:]):
        return "the weight is not symmetric"
    if not is_constant(scale) or rank(scale) != 1 or found.weight.attrs.get("axis", 1) != 0:
        return "the weight's scales are not along the output channels"
    if any(t.name and not is_constant(t) for t in found.node.inputs[2:]):
        return "the bias is not constant"
    if not is_plain(found.data):
        return "the data is not uint8 with one constant float32 scale and a zero point"
    return found.result if isinstance(found.result, str) else None


def _lower(graph: Graph, ctx: Context, found: _Convolution) -> None:
    assert isinstance(found.result, Quantized)
    quantizer = found.result.quantizer
    x, s, z = found.data.inputs[:3]
    u, v = quantizer.inputs[1:3]
    w, t = found.weight.inputs[:2]
    bias = next((b for b in found.node.inputs[2:] if b.name), None)
    extra: list[Tensor] = []
    if bias is not None:
        w, t, whole = _with_bias(graph, ctx, w, t, array(s).reshape(()), bias)
        extra = [whole]
    zero = graph.constant(f"{w.name}/zero_point", np.zeros(array(t).shape, np.int8))
    ctx.origins[zero.name] = ctx.origins.get(w.name, (w.name, None))
    out = quantizer.outputs[0]
    lowered = graph.add(
        "QLinearConv",
        [x, s, z, w, t, zero, u, v, *extra],
        [f"{out.name}/convolution"],
        dict(found.node.attrs),
        name=f"{found.node.name}/int8",
        like=out,
    )
    graph.replace_uses(out, lowered.outputs[0])


def _with_bias(
    graph: Graph, ctx: Context, w: Tensor, t: Tensor, step: Array, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and scales in which the bias fits, and the bias as int32."""
    values, scales = array(bias).astype(np.float64), array(t).astype(np.float64)
    growth = np.maximum(np.abs(values) / (_LARGEST_BIAS * float(step) * scales), 1.0)
    if (growth > 1).any():
        spread = growth.reshape(-1, *[1] * (array(w).ndim - 1))
        fewer = graph.constant(f"{w.name}/fewer", np.rint(array(w) / spread).astype(np.int8))
        larger = graph.constant(f"{t.name}/larger", (scales * growth).astype(np.float32))
        for new, old in ((fewer, w), (larger, t)):
            ctx.origins[new.name] = ctx.origins.get(old.name, (old.name, None))
        w, t, scales = fewer, larger, array(larger).astype(np.float64)
    whole = np.clip(np.rint(values / (float(step) * scales)), -(2**31), 2**31 - 1)
    made = graph.constant(f"{bias.name}/int32", whole.astype(np.int32))
    ctx.origins[made.name] = (bias.name, None)
    return w, t, made
