"""Recognizes HardSwish decomposed into elementary operators.

    x · Clip(x + 3, 0, 6) / 6                       →   HardSwish(x)
    x · HardSigmoid(x) {alpha=1/6, beta=0.5}        →   HardSwish(x)

The division may come before or after the multiplication by x, or be a Mul by 1/6. With one operator
it is visible that all values below -3 give 0, which ``trim-ranges`` uses. Refuses other bounds or
factors, and inner tensors that are used elsewhere. Source: ONNX HardSwish-14.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Refusal, Tensor, is_op, scalar
from qcompile.ir.analysis.conv_activation import bounds
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_SINCE = 14
_ALPHA, _BETA = 1 / 6, 0.5  # of the inner HardSigmoid; ONNX's defaults are 0.2 and 0.5
_TOLERANCE = 1e-3  # exporters round 1/6


@dataclass(frozen=True)
class FuseHardswish(NodeRewrite[tuple[Tensor, Tensor]]):
    """Fuse decomposed HardSwish."""

    name: ClassVar[str] = "fuse-hardswish"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("raise-opset",)
    ops: ClassVar[tuple[str, ...]] = ("Clip", "HardSigmoid")

    def match(
        self, graph: Graph, ctx: Context, node: Node
    ) -> tuple[Tensor, Tensor] | Refusal | None:
        """(x, the tensor that is its HardSwish)."""
        gate = _gate(graph, node)
        if gate is None:
            return None
        result = _product(graph, node.outputs[0], *gate)
        if result is None:
            return Refusal("no HardSwish: not multiplied by x and 1/6, or used elsewhere")
        if graph.opset < _SINCE:
            return Refusal(f"ONNX has no HardSwish at opset {graph.opset}, needs {_SINCE}")
        return gate[0], result

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Tensor, Tensor]) -> None:
        x, result = match
        graph.substitute(result, "HardSwish", [x], "hs")


def _gate(graph: Graph, node: Node) -> tuple[Tensor, float] | None:
    """x of a node that looks like the gate of a HardSwish, and the factor that is still missing."""
    if is_op(node, "HardSigmoid"):
        alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
        fits = math.isclose(alpha, _ALPHA, rel_tol=_TOLERANCE) and beta == _BETA
        return (node.inputs[0], 1.0) if fits else None
    add = graph.producer(node.inputs[0], "Add") if bounds(node) == (0.0, 6.0) else None
    if add is None:
        return None
    constants = [s for t in add.inputs if (s := scalar(t)) is not None]
    variables = [t for t in add.inputs if scalar(t) is None]
    return (variables[0], 1 / 6) if constants == [3.0] and len(variables) == 1 else None


def _product(graph: Graph, tensor: Tensor, x: Tensor, factor: float) -> Tensor | None:
    """The tensor that is ``tensor`` times x and times ``factor``, in either order."""
    missing_x = True
    while missing_x or factor != 1.0:
        node = graph.only_consumer(tensor, "Mul", "Div")
        if node is None:
            return None
        other = next((t for t in node.inputs if t is not tensor), None)
        is_dividend = is_op(node, "Mul") or node.inputs[0] is tensor
        if other is x and missing_x and is_op(node, "Mul"):
            missing_x = False
        elif other is not None and is_dividend and _is_factor(node, other, factor):
            factor = 1.0
        else:
            return None
        tensor = node.outputs[0]
    return tensor


def _is_factor(node: Node, other: Tensor, factor: float) -> bool:
    value = scalar(other)
    if value is None or not value or factor == 1.0:
        return False
    multiplier = 1 / value if is_op(node, "Div") else value
    return math.isclose(multiplier, factor, rel_tol=_TOLERANCE)
