"""Gives weights scales with which the int32 bias that ONNX Runtime computes is right.

    Conv(DQ(xq, s), DQ(Wq, t), b)   →   Conv(DQ(xq, s), DQ(Wq', t'), b)

    t' = max(t, |b| / (2^30 · s))

An integer convolution or matrix multiplication adds its bias to its sums, as ``round(b / (s·t))``
in int32. Where weights are tiny next to the bias, as behind a dead BatchNorm, that does not fit and
wraps around, or ``s·t`` is no float32 number. The weights of such a channel are then rounded more
coarsely: 2^30 steps of the bias are left, so the output changes by a millionth of the bias. A
channel whose weights are all zero gets that scale too: a larger one would round the bias. Weights
that came quantized keep their scales. Refuses biases for which no float32 scale exists. Sources:
ONNX Runtime weight_bias_quantization.cc (Cast(Round(b / (s·t))) for Conv and Gemm between Q/DQ
nodes; a MatMul followed by an Add becomes a Gemm), ONNX QLinearConv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_layout, is_op, scalar
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import Numerics, Pass, Stage

_LARGEST_BIAS = 2.0**30  # half of int32, which also holds the sum of products
_SMALLEST_STEP = 2.0**-126  # of s·t: the smallest normal float32


@dataclass(frozen=True)
class FitBiases(Pass):
    """Enlarge scales of weights until biases fit int32."""

    name: ClassVar[str] = "fit-biases"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if _is_our_weight(ctx, node):
                least = _least_scales(graph, node)
                changed |= least is not None and _enlarge(graph, ctx, node, least)
        return changed


def _is_our_weight(ctx: Context, node: Node) -> bool:
    """True for the dequantizer of a weight that was not quantized in the input model."""
    return bool(is_op(node, "DequantizeLinear") and node.inputs[0].name in ctx.origins)


def _least_scales(graph: Graph, weight: Node) -> Array | None:
    """The smallest scale of each channel, or of the tensor, that fits the biases of all readers.

    None where no reader adds a constant bias to integer sums.
    """
    scale = array(weight.inputs[1])
    found = []
    for reader in graph.consumers(weight.outputs[0]):
        step, bias = _data_step(graph, reader), _bias(graph, reader)
        if step is None or bias is None or (scale.ndim and bias.size not in (1, scale.size)):
            continue
        needed = np.maximum(np.abs(bias) / _LARGEST_BIAS, _SMALLEST_STEP) / step
        found.append(np.broadcast_to(needed if scale.ndim else needed.max(), scale.shape))
    return np.max(found, axis=0) if found else None


def _data_step(graph: Graph, node: Node) -> float | None:
    """The scale of the data operand, None where it is not quantized with one constant scale."""
    tensor = node.inputs[0]
    while (maker := graph.producer(tensor)) is not None and is_layout(maker):
        tensor = maker.inputs[0]
    if maker is None or not is_op(maker, "DequantizeLinear") or is_constant(maker.inputs[0]):
        return None
    return scalar(maker.inputs[1])


def _bias(graph: Graph, node: Node) -> Array | None:
    """The constant that is added to each output channel, float64 (outputs,) or (1,)."""
    bias: Tensor | None = None
    if is_op(node, "Conv", "Gemm") and len(node.inputs) > 2:
        bias = node.inputs[2]
    elif is_op(node, "MatMul"):
        add = graph.only_consumer(node.outputs[0], "Add")
        bias = None if add is None else next((t for t in add.inputs if is_constant(t)), None)
    if bias is None or not bias.name or not is_constant(bias):
        return None
    values = array(bias).astype(np.float64)
    channels = values.shape[-1] if values.ndim else 1
    return values.reshape(-1) if values.size == channels else None


def _enlarge(graph: Graph, ctx: Context, weight: Node, least: Array) -> bool:
    """Give a weight at least these scales; False where it has them."""
    q, scale = (array(t) for t in weight.inputs[:2])
    channel = weight.attrs.get("axis", 1) if scale.ndim else None
    others = tuple(i for i in range(q.ndim) if channel is None or i != channel % q.ndim)
    empty = (q == 0).all(axis=others)
    scales = scale.astype(np.float64)
    exact = np.where(empty, least, np.maximum(scales, least))
    if (exact > np.finfo(np.float32).max).any():
        ctx.skip(weight, "no float32 scale makes its reader's bias fit into int32")
        return False
    wanted = exact.astype(np.float32)
    if (wanted == scale).all():
        return False
    shape = [1] * q.ndim
    if channel is not None:
        shape[channel % q.ndim] = -1
    fewer = np.rint(q * (scales / wanted).reshape(shape)).astype(q.dtype)
    for slot, values, suffix in ((0, fewer, "fewer"), (1, wanted, "larger")):
        old = weight.inputs[slot]
        new = graph.set_constant(weight, slot, values, f"{old.name}/{suffix}")
        ctx.origins[new.name] = ctx.origins.get(old.name, (old.name, None))
    return True
