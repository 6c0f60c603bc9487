"""Narrows ranges to the values that make a difference to the tensor's readers.

    [lo, hi] of x, read by HardSwish alone   →   [max(lo, -3 - step), hi]

A convolution's result may range from -100 to 80, and HardSwish gives 0 for all values below -3: a
quantizer that saturates there has the same result, with steps half as wide. The range keeps one
more step, since zero points are rounded: the lowest quantized value must not be above the bound, or
values that should become 0 would not. Readers: HardSwish, HardSigmoid, Relu, Clip. Leaves tensors
alone that anything else reads. Edits nothing.
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
    """Trim ranges where all readers of a tensor give the same result beyond a bound."""

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
            sensitive = _sensitive_range(graph, tensor)
            if sensitive is not None:
                ctx.ranges.set(decision.tensor, _trimmed(span, sensitive, decision.spec))
        return False


def _sensitive_range(graph: Graph, tensor: Tensor) -> Bounds | None:
    """Bounds beyond which values make no difference to any reader, None where there are none."""
    readers = graph.consumers(tensor)
    if not readers or graph.is_output(tensor) or graph.in_subgraph(tensor):
        return None
    ranges = [r for node in readers if (r := _range_of_reader(node)) is not None]
    if len(ranges) < len(readers):
        return None
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _range_of_reader(node: Node) -> Bounds | None:
    for op, limits in _LIMITS.items():
        if is_op(node, op):
            return limits(node)
    return bounds(node)


def _hard_sigmoid(node: Node) -> Bounds | None:
    """Where max(0, min(1, alpha x + beta)) becomes 0 and 1. Source: ONNX HardSigmoid."""
    alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
    return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else None


_LIMITS: dict[str, Callable[[Node], Bounds | None]] = {
    "HardSwish": lambda node: (-3.0, np.inf),
    "HardSigmoid": _hard_sigmoid,
}


def _trimmed(span: Range, sensitive: Bounds, spec: QSpec) -> Range:
    """The range limited to the bounds, and one step beyond each bound that limits it."""
    smallest, largest = spec.limits
    low = np.minimum(np.maximum(span.lo, sensitive[0]), 0)  # the quantized range includes 0
    high = np.maximum(np.minimum(span.hi, sensitive[1]), 0)
    step = (high - low) / (largest - smallest - 2)  # of the range with one step more at both ends
    low = np.minimum(np.maximum(span.lo, np.minimum(low, sensitive[0]) - step), span.hi)
    high = np.maximum(np.minimum(span.hi, np.maximum(high, sensitive[1]) + step), span.lo)
    return Range(np.minimum(low, high), high, span.axis)
