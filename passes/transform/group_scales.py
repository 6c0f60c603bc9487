"""Per-embedding-group scales: a few scales along the channels of each activation.

    QuantizeLinear(x, s)   →   QuantizeLinear(x, [s_g(1), ..., s_g(C)], axis=-1)

Bondarenko et al. 2021, section 4: channels are sorted by range and cut into K groups, each with a
scale and zero point of its own; the scale vector holds K distinct values. Here a group need not be
adjacent channels, so no permutation is required; targets that want it run ``permute-channels``.

A channel's noise is proportional to the square of its group's range, so groups are cut where the
sum of ``size · range²`` is least. At most ``most`` of the channels leave the main group: ranges of
few sentences say little about a single channel, and groups that are cut all over the range clip
unseen text (equal groups and a scale per channel do). The number of groups is the smallest that
comes within ``slack`` of the best. Ranges are those to foresee for unseen data. Edits nothing but
the plan. Refuses tensors whose last axis has no fixed size or holds no channels (images), 16-bit
ones (their range is widened all the same), and what was not sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Refusal, Tensor
from qcompile.ir.analysis.conv_activation import channels_first
from qcompile.ir.analysis.name_patterns import matches
from qcompile.ir.analysis.transformer_roles import Role, names_to_match, roles
from qcompile.planning import Context, Decision
from qcompile.quant import FEWEST_ROWS, Array, ChannelStats, Range
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class GroupScales(Pass):
    """Choose groups of channels, and a scale for each.

    groups: 0 searches up to ``limit``, K takes the paper's K equal groups. most: share of the
    channels outside the main group. slack: how far from the best error fewer groups may stay.
    doublings: how often the data is thought to double until all is seen.
    only: patterns of tensors or roles to group, ``role:ffn-in|role:ffn-out``; none is all.
    """

    name: ClassVar[str] = "group-scales"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("permute-channels", "migrate-scales", "split-outliers")

    groups: int = 0
    limit: int = 6
    most: float = 0.125
    slack: float = 1.05
    doublings: float = 4.0
    only: str = ""

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        tensors, found, images = graph.tensors(), roles(graph), channels_first(graph)
        for decision in ctx.plan.quantized("activation"):
            if self._obstacle(decision, tensors.get(decision.tensor), found, images) is None:
                yield decision.tensor

    def run(self, graph: Graph, ctx: Context) -> bool:
        tensors, found, images = graph.tensors(), roles(graph), channels_first(graph)
        for decision in list(ctx.plan.quantized("activation")):
            stats = ctx.channels.get(decision.tensor)
            refusal = self._obstacle(decision, tensors.get(decision.tensor), found, images)
            refusal = refusal or _too_little(stats)
            if refusal is not None:
                ctx.skip(decision.tensor, f"{refusal.reason}: one scale")
            elif stats is not None:
                self._group(ctx, decision, stats)
        return False

    def _obstacle(
        self,
        decision: Decision,
        tensor: Tensor | None,
        found: Mapping[str, Role],
        images: set[str],
    ) -> Refusal | None:
        names = names_to_match(found, [decision.tensor])
        if self.only and not any(matches(p.strip(), names) for p in self.only.split("|")):
            return Refusal("not among those to be grouped")
        if decision.tensor in images:
            return Refusal("its channels are not its last axis")
        return _obstacle(decision, tensor)

    def _group(self, ctx: Context, decision: Decision, stats: ChannelStats) -> None:
        foreseen = stats.extrapolated(self.doublings)
        lo, hi = np.minimum(foreseen.lo, 0), np.maximum(foreseen.hi, 0)
        assert decision.spec is not None  # _obstacle
        fine = decision.spec.bits > 8
        parts = [np.arange(len(lo))] if fine else self._parts(hi - lo)
        if len(parts) == 1:
            ctx.ranges.set(decision.tensor, Range(lo.min(), hi.max()))
            why = f"{decision.spec.bits} bits are fine enough" if fine else "groups would not help"
            ctx.skip(decision.tensor, f"{why}: one scale")
            return
        for part in parts:
            lo[part], hi[part] = lo[part].min(), hi[part].max()
        spec = replace(decision.spec, granularity="channel", axis=-1)
        ctx.ranges.set(decision.tensor, Range(lo, hi, -1))
        why = f"{decision.reason}; {len(parts)} groups of channels"
        ctx.plan.replace(decision, spec=spec, reason=why)

    def _parts(self, width: Array) -> list[Array]:
        """Channels of each group, widest first."""
        order = np.argsort(-width, kind="stable")
        if self.groups:
            return [p for p in np.array_split(order, self.groups) if len(p)]
        ranked = width[order].astype(np.float64)
        cuts = _best_cuts(ranked, self.limit, int(len(order) * self.most), self.slack)
        return np.split(order, cuts)


def _too_little(stats: ChannelStats | None) -> Refusal | None:
    if stats is None:
        return Refusal("its channels were not sampled")
    if len(stats.rows) < FEWEST_ROWS:
        return Refusal(f"{len(stats.rows)} rows say too little of its channels")
    return None


def _obstacle(decision: Decision, tensor: Tensor | None) -> Refusal | None:
    if tensor is None or not tensor.shape or not isinstance(tensor.shape[-1], int):
        return Refusal("its last axis has no fixed size")
    if len(tensor.shape) < 2 or tensor.shape[-1] < 2:
        return Refusal("it has no channels")
    if decision.spec is None or decision.spec.granularity != "tensor":
        return Refusal("it has scales of its own")
    return None


def _best_cuts(ranked: Array, limit: int, most: int, slack: float) -> list[int]:
    """Where to cut sorted widths so that ``sum(size · widest²)`` is small: at most ``limit`` parts.

    Dynamic programming over a grid of positions, fine among the widest.
    """
    steps = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
    grid = [0, *(p for p in steps if p <= most and p < len(ranked)), len(ranked)]
    cost = {(i, j): (grid[j] - grid[i]) * ranked[grid[i]] ** 2
            for i in range(len(grid)) for j in range(i + 1, len(grid))}  # fmt: skip
    last = len(grid) - 1
    best: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]
    totals: list[tuple[float, list[int]]] = []
    for _ in range(limit):
        row: dict[int, tuple[float, list[int]]] = {}
        for j in range(1, len(grid)):
            options = [
                (error + cost[i, j], [*cuts, grid[j]])
                for i, (error, cuts) in best[-1].items()
                if i < j
            ]
            if options:
                row[j] = min(options)
        best.append(row)
        if last in row:
            totals.append((row[last][0], row[last][1][:-1]))
    least = min(error for error, _ in totals)
    return next(cuts for error, cuts in totals if error <= least * slack)
