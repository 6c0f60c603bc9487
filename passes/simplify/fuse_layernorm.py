"""Recognises a LayerNormalization written out as elementary operators.

    m = ReduceMean(x, -1); d = x - m; v = ReduceMean(d², -1)
    y = d / Sqrt(v + ε) · γ + β          →   y = LayerNormalization(x, γ, β) {axis=-1, epsilon=ε}

Exporters below opset 17 write this form. d² is Pow(d, 2) or Mul(d, d). Refuses where the mean is
over another axis or drops it, γ or β is no vector of that length, an inner tensor is used
elsewhere, or the opset is too old. Source: ONNX LayerNormalization-17.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_op, rank, scalar, shape_of
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

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
class FuseLayerNorm(Pass):
    """Fuse decomposed layer normalization."""

    name: ClassVar[str] = "fuse-layernorm"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("raise-opset",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if not is_op(node, "Sqrt"):
                continue
            match = _match(graph, node)
            if isinstance(match, str):
                ctx.skip(node, f"no LayerNormalization: {match}")
            elif graph.opset < _SINCE:
                ctx.skip(node, f"LayerNormalization needs opset {_SINCE}, this is {graph.opset}")
            else:
                _rewrite(graph, match)
                changed = True
        return bool(graph.remove_dead()) or changed


def _rewrite(graph: Graph, match: _Match) -> None:
    node = graph.add(
        "LayerNormalization",
        [match.x, match.gamma, match.beta],
        [f"{match.result.name}/layernorm"],
        {"axis": -1, "epsilon": match.epsilon},
        like=match.result,
    )
    graph.replace_uses(match.result, node.outputs[0])


def _match(graph: Graph, sqrt: Node) -> _Match | str:
    """Match around the square root, backwards to x and forwards to the result."""
    backwards = _variance(graph, sqrt)
    if isinstance(backwards, str):
        return backwards
    x, centred, epsilon = backwards
    divide = graph.only_consumer(sqrt.outputs[0])
    if divide is None or not is_op(divide, "Div") or divide.inputs[0] is not centred:
        return "the root does not divide the centred values"
    scaled = _affine(graph, divide.outputs[0], "Mul")
    if isinstance(scaled, str):
        return scaled
    shifted = _affine(graph, scaled[0], "Add")
    if isinstance(shifted, str):
        return shifted
    scale, shift, data = (shape_of(t) for t in (scaled[1], shifted[1], x))
    if scale != shift:
        return f"scale {scale} and shift {shift} differ in shape"
    if data and isinstance(data[-1], int) and scale not in ((data[-1],), (1,)):
        return f"scale {scale} does not fit values of shape {data}"
    return _Match(x, scaled[1], shifted[1], epsilon, shifted[0])


def _variance(graph: Graph, sqrt: Node) -> tuple[Tensor, Tensor, float] | str:
    """(x, x - mean, epsilon) of ``Sqrt(ReduceMean((x - mean)²) + epsilon)``."""
    add = graph.producer(sqrt.inputs[0])
    if add is None or not is_op(add, "Add"):
        return "no epsilon is added under the root"
    epsilon = next((s for t in add.inputs if (s := scalar(t)) is not None), None)
    mean = next((p for t in add.inputs if (p := graph.producer(t)) is not None), None)
    if epsilon is None or mean is None or not is_op(mean, "ReduceMean"):
        return "no mean of squares under the root"
    square = graph.producer(mean.inputs[0])
    if square is None or not _is_square(square):
        return "no square under the mean"
    centred = square.inputs[0]
    minus = graph.producer(centred)
    if minus is None or not is_op(minus, "Sub"):
        return "the squared values are not centred"
    x, first_mean = minus.inputs[0], graph.producer(minus.inputs[1])
    if first_mean is None or not is_op(first_mean, "ReduceMean") or first_mean.inputs[0] is not x:
        return "the mean that is subtracted is not the mean of the same values"
    if not (_over_last_axis(mean, x) and _over_last_axis(first_mean, x)):
        return "the mean is not over the last axis"
    return x, centred, epsilon


def _is_square(node: Node) -> bool:
    if is_op(node, "Pow"):
        return scalar(node.inputs[1]) == 2.0
    return is_op(node, "Mul") and node.inputs[0] is node.inputs[1]


def _over_last_axis(node: Node, x: Tensor) -> bool:
    if not node.attrs.get("keepdims", 1):
        return False  # means of other rows would be subtracted
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1 and is_constant(node.inputs[1]):
        axes = array(node.inputs[1]).tolist()
    last = rank(x)
    return axes is not None and list(axes) in ([-1], [None if last is None else last - 1])


def _affine(graph: Graph, tensor: Tensor, op: str) -> tuple[Tensor, Tensor] | str:
    """(result, vector) of the Mul by γ or Add of β that alone reads ``tensor``."""
    node = graph.only_consumer(tensor)
    if node is None or not is_op(node, op):
        return f"no {op} alone reads {tensor.name!r}"
    vector = next((t for t in node.inputs if t is not tensor), None)
    if vector is None or not is_constant(vector) or rank(vector) != 1:
        return f"the operand of {op} is no constant vector"
    return node.outputs[0], vector
