"""Folds the scaling and shifting of a convolution's or Gemm's channels into its weight and bias.

    BatchNormalization(Conv(x, W, b), g, h, m, v)   →   Conv(x, W·s, (b - m)·s + h)
    with s = g / √(v + ε), one per output channel
    Mul(Conv(x, W, b), c) + d                       →   Conv(x, W·c, b·c + d)

Computed in float64 and rounded once. Handles BatchNormalization in inference mode after Conv,
ConvTranspose and Gemm; a Mul or Add of constants, one per channel or a scalar, after the first two.
Refuses weights and biases with other readers, results with other readers, parameters that are not
constant or not finite, training mode, and a ConvTranspose with groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import (
    Graph,
    Node,
    Refusal,
    array,
    is_constant,
    is_float,
    is_op,
    is_plain_gemm,
    rank,
)
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_EPSILON = 1e-5  # BatchNormalization's default


@dataclass(frozen=True)
class FoldBatchnorm(NodeRewrite[tuple[Node, Node]]):
    """Fold BatchNormalization, constant factors and constant sums into convolutions and Gemm."""

    name: ClassVar[str] = "fold-batchnorm"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    ops: ClassVar[tuple[str, ...]] = ("BatchNormalization", "Mul", "Add")

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the node that scales or shifts, the operator to fold it into)."""
        linear = _linear_before(graph, node)
        if linear is None:
            return None
        return _obstacle(graph, node, linear) or (node, linear)

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        _fold(graph, *match)
        graph.remove_dead()  # a dead node would count as a reader of its constants


def _linear_before(graph: Graph, node: Node) -> Node | None:
    """The operator with a weight whose result the node scales or shifts by constants."""
    if is_op(node, "BatchNormalization"):
        return graph.producer(node.inputs[0], "Conv", "ConvTranspose", "Gemm")
    if sum(is_constant(t) for t in node.inputs) != 1:
        return None
    source = next(t for t in node.inputs if not is_constant(t))
    return graph.producer(source, "Conv", "ConvTranspose")


def _obstacle(graph: Graph, node: Node, linear: Node) -> Refusal | None:
    if graph.only_consumer(linear.outputs[0]) is None:
        return Refusal("the tensor that it scales or shifts has other readers")
    constants = [t for t in linear.inputs[1:] if t.name]
    if not all(is_constant(t) and is_float(t) for t in constants):
        return Refusal("the weight or the bias before it is not a float32 constant")
    shared = next((t for t in constants if len(graph.consumers(t)) > 1 or graph.is_output(t)), None)
    if shared is not None:
        return Refusal(f"{shared.name!r} is shared")
    if is_op(linear, "ConvTranspose") and linear.attrs.get("group", 1) != 1:
        return Refusal("the ConvTranspose before it has groups")
    has_vector = all(rank(t) == 1 for t in linear.inputs[2:] if t.name)
    if is_op(linear, "Gemm") and not (is_plain_gemm(linear) and has_vector):
        return Refusal("the Gemm before it has transA, alpha, beta or a bias that is not a vector")
    return _parameter_obstacle(node, linear)


def _parameter_obstacle(node: Node, linear: Node) -> Refusal | None:
    """Why the node does not scale or shift channels by constants, None where it does."""
    parameters = [t for t in node.inputs[1:5] if t.name]
    if is_op(node, "BatchNormalization"):
        if node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:]):
            return Refusal("it normalizes by the batch, as in training")
        if node.attrs.get("spatial", 1) != 1:
            return Refusal("it normalizes each position separately")
    else:
        parameters = [t for t in node.inputs if is_constant(t)]
        if node.attrs or not _by_channel(tuple(parameters[0].shape), linear):
            return Refusal("its constant does not have one value per channel")
    if not all(is_constant(t) and is_float(t) for t in parameters):
        return Refusal("its parameters are not float32 constants")
    if not all(np.isfinite(v).all() for v in _affine(node)):
        return Refusal("its factors are not finite")
    return None


def _by_channel(shape: tuple[int, ...], linear: Node) -> bool:
    """True for one value, or one per channel of a result [batch, channels, …]."""
    dims = rank(linear.inputs[1]) or 0
    if len(shape) > dims:
        return False
    padded = (1,) * (dims - len(shape)) + shape
    return padded[1] in (1, _channels(linear)) and all(d == 1 for d in (padded[0], *padded[2:]))


def _affine(node: Node) -> tuple[Array, Array]:
    """Scale and shift, float64: (channels,), or (1,) for all channels."""
    if is_op(node, "BatchNormalization"):
        gamma, beta, mean, variance = (array(t).astype(np.float64) for t in node.inputs[1:5])
        with np.errstate(all="ignore"):  # values that are not finite are refused
            scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", _EPSILON))
            return scale, beta - mean * scale
    values = array(next(t for t in node.inputs if is_constant(t))).astype(np.float64).reshape(-1)
    one = np.ones_like(values)
    return (values, 0 * one) if is_op(node, "Mul") else (one, values)


def _axis(linear: Node) -> int:
    """The axis of output channels in the weight."""
    if is_op(linear, "Conv"):
        return 0
    return 0 if linear.attrs.get("transB", 0) else 1


def _channels(linear: Node) -> int:
    return int(linear.inputs[1].shape[_axis(linear)])


def _fold(graph: Graph, node: Node, linear: Node) -> None:
    scale, shift = (np.broadcast_to(v, _channels(linear)) for v in _affine(node))
    weight, bias = linear.inputs[1], [t for t in linear.inputs[2:] if t.name]
    along_outputs = [1] * (rank(weight) or 0)
    along_outputs[_axis(linear)] = -1
    scaled = (array(weight) * scale.reshape(along_outputs)).astype(np.float32)
    shifted = ((array(bias[0]) if bias else 0.0) * scale + shift).astype(np.float32)
    graph.set_constant(linear, 1, scaled, f"{weight.name}/folded")
    folded = graph.constant(f"{bias[0].name if bias else f'{linear.name}/bias'}/folded", shifted)
    if len(linear.inputs) > 2:
        graph.set_input(linear, 2, folded)
    else:
        linear.inputs.append(folded)
    graph.replace_uses(node.outputs[0], linear.outputs[0])
