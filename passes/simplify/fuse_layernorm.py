"""Recognizes a LayerNormalization decomposed into elementary operators.

    m = ReduceMean(x, -1); d = x - m; v = ReduceMean(d², -1)
    y = d / Sqrt(v + ε) · γ + β          →   y = LayerNormalization(x, γ, β) {axis=-1, epsilon=ε}

Exporters below opset 17 write this pattern. d² is Pow(d, 2) or Mul(d, d). Refuses where the mean is
over another axis or drops the axis, γ or β is not a vector of its length, an inner tensor is used
elsewhere, or the opset is too old. Source: ONNX LayerNormalization-17.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import (
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    is_constant,
    is_op,
    rank,
    scalar,
    shape_of,
)
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_SINCE = 17


@dataclass(frozen=True)
class _Match:
    """The pieces of one LayerNormalization; ``result`` is the last tensor of the pattern."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    epsilon: float
    result: Tensor


@dataclass(frozen=True)
class FuseLayerNorm(NodeRewrite[_Match]):
    """Fuse decomposed layer normalization."""

    name: ClassVar[str] = "fuse-layernorm"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("raise-opset",)
    ops: ClassVar[tuple[str, ...]] = ("Sqrt",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal:
        match = _match(graph, node)
        if isinstance(match, Refusal):
            return match.about("no LayerNormalization")
        if graph.opset < _SINCE:
            return Refusal(f"LayerNormalization needs opset {_SINCE}, this is {graph.opset}")
        return match

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        inputs = [match.x, match.gamma, match.beta]
        attrs = {"axis": -1, "epsilon": match.epsilon}
        graph.substitute(match.result, "LayerNormalization", inputs, "layernorm", attrs)


def _match(graph: Graph, sqrt: Node) -> _Match | Refusal:
    """Match around the square root, backwards to x and forwards to the result."""
    backwards = _variance(graph, sqrt)
    if isinstance(backwards, Refusal):
        return backwards
    x, centred, epsilon = backwards
    divide = graph.only_consumer(sqrt.outputs[0], "Div")
    if divide is None or divide.inputs[0] is not centred:
        return Refusal("the root does not divide the centred values")
    scaled = _affine(graph, divide.outputs[0], "Mul")
    if isinstance(scaled, Refusal):
        return scaled
    shifted = _affine(graph, scaled[0], "Add")
    if isinstance(shifted, Refusal):
        return shifted
    scale, shift, data = (shape_of(t) for t in (scaled[1], shifted[1], x))
    if scale != shift:
        return Refusal(f"scale {scale} and shift {shift} differ in shape")
    if data and isinstance(data[-1], int) and scale not in ((data[-1],), (1,)):
        return Refusal(f"scale {scale} does not fit values of shape {data}")
    return _Match(x, scaled[1], shifted[1], epsilon, shifted[0])


def _variance(graph: Graph, sqrt: Node) -> tuple[Tensor, Tensor, float] | Refusal:
    """(x, x - mean, epsilon) of ``Sqrt(ReduceMean((x - mean)²) + epsilon)``."""
    add = graph.producer(sqrt.inputs[0], "Add")
    if add is None:
        return Refusal("no epsilon is added under the root")
    epsilon = next((s for t in add.inputs if (s := scalar(t)) is not None), None)
    mean = next((p for t in add.inputs if (p := graph.producer(t)) is not None), None)
    if epsilon is None or mean is None or not is_op(mean, "ReduceMean"):
        return Refusal("no mean of squares under the root")
    square = graph.producer(mean.inputs[0])
    if square is None or not _is_square(square):
        return Refusal("no square under the mean")
    centred = square.inputs[0]
    minus = graph.producer(centred, "Sub")
    if minus is None:
        return Refusal("the squared values are not centred")
    x, first_mean = minus.inputs[0], graph.producer(minus.inputs[1], "ReduceMean")
    if first_mean is None or first_mean.inputs[0] is not x:
        return Refusal("the mean that is subtracted is not the mean of the same values")
    if not (_over_last_axis(mean, x) and _over_last_axis(first_mean, x)):
        return Refusal("the mean is not over the last axis")
    return x, centred, epsilon


def _is_square(node: Node) -> bool:
    if is_op(node, "Pow"):
        return scalar(node.inputs[1]) == 2.0
    return is_op(node, "Mul") and node.inputs[0] is node.inputs[1]


def _over_last_axis(node: Node, x: Tensor) -> bool:
    if not node.attrs.get("keepdims", 1):
        return False  # without the axis, broadcasting would subtract the means of other rows
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1 and is_constant(node.inputs[1]):
        axes = array(node.inputs[1]).tolist()
    last = rank(x)
    return axes is not None and list(axes) in ([-1], [None if last is None else last - 1])


def _affine(graph: Graph, tensor: Tensor, op: str) -> tuple[Tensor, Tensor] | Refusal:
    """(result, vector) of the Mul by γ or Add of β that is the only reader of ``tensor``."""
    node = graph.only_consumer(tensor, op)
    if node is None:
        return Refusal(f"{tensor.name!r} is not read by {op} alone")
    vector = next((t for t in node.inputs if t is not tensor), None)
    if vector is None or not is_constant(vector) or rank(vector) != 1:
        return Refusal(f"the operand of {op} is not a constant vector")
    return node.outputs[0], vector
