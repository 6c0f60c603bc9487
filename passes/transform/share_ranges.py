"""Gives tensors between which values are only moved or selected one range.

    range(a), range(b), range(Concat(a, b))   →   the union for all three
    range(x), range(MaxPool(x))               →   the union for both

Int8 values then pass these operators unchanged: an int8 Concat needs one scale, and a quantizer
after MaxPool can move before it. Handles MaxPool, Concat and layout operators whose operand and
result are planned with the same type. Refuses a range that would grow by more than ``most``: its
values would get too few steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, is_layout, is_op
from qcompile.planning import Context
from qcompile.quant import QSpec, Range
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class ShareRanges(Pass):
    """Share ranges over MaxPool, Concat and layout operators.

    most: how many times wider a range may become; 4 costs two of eight bits.
    """

    most: float = 4.0

    name: ClassVar[str] = "share-ranges"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = (
        "widen-ranges",
        "migrate-scales",
        "split-outliers",
        "trim-ranges",
    )

    def __post_init__(self) -> None:
        if not self.most >= 1:
            raise ValueError(f"most is {self.most}, expected at least 1")

    def run(self, graph: Graph, ctx: Context) -> bool:
        specs = {d.tensor: d.spec for d in ctx.plan.quantized("activation") if d.spec is not None}
        for group in _groups(graph, ctx, specs):
            spans = {name: span for name in group if (span := ctx.ranges.get(name)) is not None}
            union = _union(list(spans.values()))
            narrow = [n for n, s in spans.items() if _width(union) > self.most * _width(s)]
            for name in narrow:
                ctx.skip(name, "the range of its neighbours would leave it too few steps")
            shared = {n: s for n, s in spans.items() if n not in narrow}
            for name in shared:
                ctx.ranges.set(name, _union([*shared.values()]))
                if len(shared) > 1:
                    ctx.fixed_ranges[name] = "integers pass between it and its neighbours unchanged"
        return False


def _groups(graph: Graph, ctx: Context, specs: Mapping[str, QSpec]) -> list[list[str]]:
    """Groups of names that such operators connect, each in the order of the graph."""
    group_of: dict[str, list[str]] = {}
    for node in graph.nodes:
        if not _only_selects(node):
            continue
        names = [t.name for t in (*node.inputs, node.outputs[0])]
        planned = [n for n in names if n in specs and _is_per_tensor(ctx.ranges.get(n))]
        spec = specs.get(node.outputs[0].name)
        joined: list[str] = []
        for name in (n for n in planned if specs[n] == spec and node.outputs[0].name in planned):
            joined += [n for n in group_of.get(name, [name]) if n not in joined]
        group_of |= dict.fromkeys(joined, joined)
    groups = {id(g): g for g in group_of.values() if len(g) > 1}
    return list(groups.values())


def _only_selects(node: Node) -> bool:
    """True where every value of the first result is a value of an operand."""
    return is_layout(node) or is_op(node, "MaxPool", "Concat")


def _is_per_tensor(span: Range | None) -> bool:
    return span is not None and span.axis is None


def _union(spans: list[Range]) -> Range:
    return Range(np.min([s.lo for s in spans]), np.max([s.hi for s in spans]))


def _width(span: Range) -> float:
    """The width of the quantized range, which always includes 0."""
    return max(float(span.hi), 0.0) - min(float(span.lo), 0.0)
