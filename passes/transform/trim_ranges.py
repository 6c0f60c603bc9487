"""Gives no steps to values that all readers treat alike.

    [lo, hi] of x, read by HardSwish alone   →   [max(lo, -3 - step), hi]

A convolution's result may reach from -100 to 80, and a HardSwish makes 0 of all below -3: a
quantizer that saturates there answers the same, in steps half as wide. One step more is kept, since
zero points are rounded: the lowest integer must not stand for more than the bound, or what should
be 0 is not.
Readers: HardSwish, HardSigmoid, Relu, Clip. Leaves tensors alone that anything else reads. Edits
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Tensor, is_op
from qcompile.ir.analysis.conv_activation import bounds
from qcompile.planning import Context
from qcompile.quant import QSpec, Range
from qcompile.rewriting import Numerics, Pass, Stage

Bounds = tuple[float, float]


@dataclass(frozen=True)
class TrimRanges(Pass):
    """Trim ranges where what reads a tensor answers alike beyond a bound."""

    name: ClassVar[str] = "trim-ranges"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("widen-ranges", "migrate-scales", "split-outliers")

    def run(self, graph: Graph, ctx: Context) -> bool:
        tensors = graph.tensors()
        for decision in ctx.plan.quantized("activation"):
            tensor, span = tensors.get(decision.tensor), ctx.ranges.get(decision.tensor)
            if tensor is None or span is None or decision.spec is None:
                continue
            alive = _alive(graph, tensor)
            if alive is not None:
                ctx.ranges.set(decision.tensor, _trimmed(span, alive, decision.spec))
        return False


def _alive(graph: Graph, tensor: Tensor) -> Bounds | None:
    """Beyond which values make no difference to any reader, None where there is no such bound."""
    readers = graph.consumers(tensor)
    if not readers or graph.is_output(tensor) or graph.in_subgraph(tensor):
        return None
    found = [_of_reader(node) for node in readers]
    limits = [limit for limit in found if limit is not None]
    if len(limits) < len(found):
        return None
    return min(low for low, _ in limits), max(high for _, high in limits)


def _of_reader(node: Node) -> Bounds | None:
    for op, limits in _LIMITS.items():
        if is_op(node, op):
            return limits(node)
    return bounds(node)


def _hard_sigmoid(node: Node) -> Bounds | None:
    """Zero and one of max(0, min(1, alpha x + beta)). Source: ONNX HardSigmoid."""
    alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
    return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else None


_LIMITS: dict[str, Callable[[Node], Bounds | None]] = {
    "HardSwish": lambda node: (-3.0, np.inf),
    "HardSigmoid": _hard_sigmoid,
}


def _trimmed(span: Range, alive: Bounds, spec: QSpec) -> Range:
    """The range cut to the bounds and one step beyond each that cuts."""
    smallest, largest = spec.limits
    low = np.minimum(np.maximum(span.lo, alive[0]), 0)  # 0 is always part of what is quantized
    high = np.maximum(np.minimum(span.hi, alive[1]), 0)
    step = (high - low) / (largest - smallest - 2)  # as it will be once both ends have one more
    low = np.minimum(np.maximum(span.lo, np.minimum(low, alive[0]) - step), span.hi)
    high = np.maximum(np.minimum(span.hi, np.maximum(high, alive[1]) + step), span.lo)
    return Range(np.minimum(low, high), high, span.axis)
