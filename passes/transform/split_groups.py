"""One product for each group of channels, with scales of its own, summed.

    x → Linear(W)   →   x[:, :a] → Linear(W[:a]) + x[:, a:] → Linear(W[a:]) + ...

The form that Bondarenko et al. 2021 (section 4) draw for hardware: channels sorted by range are cut
into K groups, so each group has its own activation and weight scales and its product is an integer
one. On CPU K products cost more than one, so no target does this by default; ``migrate-scales`` and
``split-outliers`` keep one product. Wants ``permute-channels`` before it: groups are adjacent
channels. Group sizes are multiples of ``align``, the width of integer dot product instructions.
Refuses sites without statistics, of fewer channels than groups, and transposed weights.
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
    """Split linear layers into one product for each group of channels.

    groups: how many. align: group sizes are multiples of this. doublings: how often the data is
    thought to double until all is seen.
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
            cuts = _cuts(len(stats.lo), self.groups, self.align) if stats is not None else []
            refusal = _obstacle(site, stats, cuts)
            if refusal is not None:
                ctx.skip(site.data, refusal.reason)
            elif stats is not None:
                _split(graph, ctx, site, stats.extrapolated(self.doublings), cuts)
                changed = True
        return changed


def _cuts(channels: int, groups: int, align: int) -> list[int]:
    """Ends of the groups: as equal as multiples of ``align`` allow, the last one takes the rest."""
    ends = [round(channels * k / groups / align) * align for k in range(1, groups)]
    return sorted({e for e in ends if 0 < e < channels} | {channels})


def _obstacle(site: LinearGroup, stats: ChannelStats | None, cuts: list[int]) -> Refusal | None:
    if stats is None:
        return Refusal("its channels were not sampled")
    if site.spec is None or site.spec.granularity != "tensor":
        return Refusal("it has no quantizer of its own with one scale")
    if any(linear.transposed or linear.node.op != "MatMul" for linear in site.linears):
        return Refusal("a layer is a Gemm: its bias would be added once for each group")
    if len(cuts) < 2:
        return Refusal(f"{cuts[0]} channels are too few for groups of this size")
    return None


def _split(
    graph: Graph, ctx: Context, site: LinearGroup, stats: ChannelStats, cuts: list[int]
) -> None:
    starts = [0, *cuts[:-1]]
    parts = [_slice(graph, site, a, b) for a, b in zip(starts, cuts, strict=True)]
    for part, a, b in zip(parts, starts, cuts, strict=True):
        ctx.ranges.set(part.name, Range(stats.lo[a:b].min(), stats.hi[a:b].max()))
    for linear in site.linears:
        _sum_of_products(graph, ctx, site, linear, list(zip(parts, starts, cuts, strict=True)))


def _slice(graph: Graph, site: LinearGroup, start: int, stop: int) -> Tensor:
    bounds = [graph.constant(f"{site.data}/{n}", np.array([v], np.int64)) for n, v in
              (("start", start), ("stop", stop), ("axis", -1))]  # fmt: skip
    name = f"{site.data}/channels_{start}_{stop}"
    node = graph.add("Slice", [site.tensor, *bounds], [name], like=site.tensor)
    node.outputs[0].shape = None
    return node.outputs[0]


def _sum_of_products(
    graph: Graph,
    ctx: Context,
    site: LinearGroup,
    linear: QuantizedLinear,
    parts: list[tuple[Tensor, int, int]],
) -> None:
    """Replace one product; every part gets the decisions of the whole."""
    out, weight = linear.node.outputs[0], array(linear.weight)
    mine = [d for d in ctx.plan.quantized() if any(u.node == linear.node.name for u in d.uses)]
    why: dict[str, str] = {d.kind: d.reason for d in mine}
    total: Tensor | None = None
    for part, start, stop in parts:
        rows = graph.constant(f"{linear.weight.name}/rows_{start}_{stop}", weight[start:stop])
        name = f"{linear.node.name}/{start}_{stop}"
        made_name = f"{out.name}/{start}_{stop}"
        product = graph.add("MatMul", [part, rows], [made_name], name=name, like=out)
        _decide(ctx, product.name, part, rows, site, linear, why)
        made = product.outputs[0]
        total = made if total is None else graph.add(
            "Add", [total, made], [f"{out.name}/to_{stop}"], like=out
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
