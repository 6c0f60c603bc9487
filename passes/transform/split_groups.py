"""Splits each linear layer into one matrix multiplication per group of channels, and their sum.

    x → Linear(W)   →   x[:, :a] → Linear(W[:a]) + x[:, a:] → Linear(W[a:]) + ...

What Bondarenko et al. 2021 (section 4) propose for hardware: channels sorted by range are divided
into K groups, so each group has its own activation and weight scales and its matrix multiplication
runs in int8. On CPU, K multiplications cost more than one, so no target does this by default;
``migrate-scales`` and ``split-outliers`` keep one. Needs ``permute-channels`` before it: groups are
adjacent channels. Group sizes are multiples of ``align``, the width of int8 dot product
instructions. Refuses linear groups without statistics or with too few channels, and Gemm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Refusal, Tensor, array
from qcompile.planning import Context, Decision, LinearGroup, QuantizedLinear, Use, linear_groups
from qcompile.quant import ChannelStats, Range
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class SplitGroups(Pass):
    """Split linear layers into one matrix multiplication per group of channels.

    groups: how many. align: group sizes are multiples of this. doublings: ranges are extrapolated
    to the data doubled so many times.
    """

    name: ClassVar[str] = "split-groups"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("permute-channels",)

    groups: int = 4
    align: int = 64
    doublings: float = 4.0

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return (site.data for site in linear_groups(graph, ctx))

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for site in linear_groups(graph, ctx):
            stats = ctx.channels.get(site.data)
            ends = _group_ends(len(stats.lo), self.groups, self.align) if stats is not None else []
            refusal = _obstacle(site, stats, ends) or site.shared_weight(graph)
            if refusal is not None:
                ctx.skip(site.data, refusal.reason)
            elif stats is not None:
                _split(graph, ctx, site, stats.extrapolated(self.doublings), ends)
                changed = True
        return changed


def _group_ends(channels: int, groups: int, align: int) -> list[int]:
    """Ends of the groups: as equal as multiples of ``align`` allow, the last one takes the rest."""
    ends = [round(channels * k / groups / align) * align for k in range(1, groups)]
    return sorted({e for e in ends if 0 < e < channels} | {channels})


def _obstacle(site: LinearGroup, stats: ChannelStats | None, ends: list[int]) -> Refusal | None:
    if stats is None:
        return Refusal("its channels were not sampled")
    if site.spec is None or site.spec.granularity != "tensor":
        return Refusal("it does not have its own quantizer with one scale")
    if any(linear.transposed or linear.node.op != "MatMul" for linear in site.linears):
        return Refusal("a layer is a Gemm: its bias would be added once for each group")
    if len(ends) < 2:
        return Refusal(f"{ends[0]} channels are too few for groups of this size")
    return None


def _split(
    graph: Graph, ctx: Context, site: LinearGroup, stats: ChannelStats, ends: list[int]
) -> None:
    starts = [0, *ends[:-1]]
    parts = [_slice(graph, site, a, b) for a, b in zip(starts, ends, strict=True)]
    for part, a, b in zip(parts, starts, ends, strict=True):
        ctx.ranges.set(part.name, Range(stats.lo[a:b].min(), stats.hi[a:b].max()))
    for linear in site.linears:
        _sum_of_matmuls(graph, ctx, site, linear, list(zip(parts, starts, ends, strict=True)))


def _slice(graph: Graph, site: LinearGroup, start: int, stop: int) -> Tensor:
    bounds = [graph.constant(f"{site.data}/{n}", np.array([v], np.int64)) for n, v in
              (("start", start), ("stop", stop), ("axis", -1))]  # fmt: skip
    name = f"{site.data}/channels_{start}_{stop}"
    node = graph.add("Slice", [site.tensor, *bounds], [name], like=site.tensor)
    node.outputs[0].shape = None
    return node.outputs[0]


def _sum_of_matmuls(
    graph: Graph,
    ctx: Context,
    site: LinearGroup,
    linear: QuantizedLinear,
    parts: list[tuple[Tensor, int, int]],
) -> None:
    """Replace one linear layer; the decisions on it are repeated for each part."""
    out, weight = linear.node.outputs[0], array(linear.weight)
    decisions = [d for d in ctx.plan.quantized() if any(u.node == linear.node.name for u in d.uses)]
    why: dict[str, str] = {d.kind: d.reason for d in decisions}
    total: Tensor | None = None
    for part, start, stop in parts:
        rows = graph.constant(f"{linear.weight.name}/rows_{start}_{stop}", weight[start:stop])
        name = f"{linear.node.name}/{start}_{stop}"
        output_name = f"{out.name}/{start}_{stop}"
        matmul = graph.add("MatMul", [part, rows], [output_name], name=name, like=out)
        _decide(ctx, matmul.name, part, rows, site, linear, why)
        summand = matmul.outputs[0]
        total = summand if total is None else graph.add(
            "Add", [total, summand], [f"{out.name}/to_{stop}"], like=out
        ).outputs[0]  # fmt: skip
    ctx.plan.forget(linear.node.name)
    assert total is not None
    graph.replace_uses(out, total)
    graph.remove_dead()


def _decide(
    ctx: Context,
    node: str,
    part: Tensor,
    rows: Tensor,
    site: LinearGroup,
    linear: QuantizedLinear,
    why: dict[str, str],
) -> None:
    reason = why.get("activation", "")
    ctx.plan.decide(Decision(part.name, "activation", site.spec, reason, (Use(node, 0),)))
    reason = why.get("weight", "")
    ctx.plan.decide(Decision(rows.name, "weight", linear.spec, reason, (Use(node, 1),)))
