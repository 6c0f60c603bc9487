"""Per-embedding-group scales: a few scales along the channels of each activation.

    QuantizeLinear(x, s)   →   QuantizeLinear(x, [s_g(1), ..., s_g(C)], axis=-1)

Bondarenko et al. 2021, section 4: channels are sorted by range and divided into K groups, each with
its own scale and zero point; the scale vector holds K distinct values. Here the channels of a group
need not be adjacent, so no permutation is required; targets that need it run ``permute-channels``.

A channel's noise is proportional to the square of its group's range, so the groups are those with
the least sum of ``size · range²``. At most the share ``most`` of the channels is outside the main
group: ranges from few sentences say little about a single channel, and many narrow groups clip
unseen text (as equal groups and a scale per channel do). The number of groups is the smallest whose
error is within ``slack`` of the best. Ranges are extrapolated. Edits only the plan. Refuses
tensors whose last axis has no fixed size or is not the channels (images), 16-bit tensors (their
range is extrapolated all the same), and tensors that were not sampled.
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

    groups: 0 searches up to ``limit``, K takes the paper's K equal groups. most: largest share of
    the channels outside the main group. slack: fewer groups are taken if their error is at most
    this many times the best. doublings: ranges are extrapolated to the data doubled so many times.
    only: patterns of tensors or roles to group, ``role:ffn-in|role:ffn-out``; empty for all.
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
        tensors, role_of, images = graph.tensors(), roles(graph), channels_first(graph)
        for decision in ctx.plan.quantized("activation"):
            if self._obstacle(decision, tensors.get(decision.tensor), role_of, images) is None:
                yield decision.tensor

    def run(self, graph: Graph, ctx: Context) -> bool:
        tensors, role_of, images = graph.tensors(), roles(graph), channels_first(graph)
        for decision in list(ctx.plan.quantized("activation")):
            stats = ctx.channels.get(decision.tensor)
            refusal = self._obstacle(decision, tensors.get(decision.tensor), role_of, images)
            refusal = refusal or _sample_obstacle(stats)
            if refusal is not None:
                ctx.skip(decision.tensor, f"{refusal.reason}: one scale")
            elif stats is not None:
                self._group(ctx, decision, stats)
        return False

    def _obstacle(
        self,
        decision: Decision,
        tensor: Tensor | None,
        role_of: Mapping[str, Role],
        images: set[str],
    ) -> Refusal | None:
        names = names_to_match(role_of, [decision.tensor])
        if self.only and not any(matches(p.strip(), names) for p in self.only.split("|")):
            return Refusal("no pattern of the option 'only' matches it")
        if decision.tensor in images:
            return Refusal("its channels are not its last axis")
        return _obstacle(decision, tensor)

    def _group(self, ctx: Context, decision: Decision, stats: ChannelStats) -> None:
        extrapolated = stats.extrapolated(self.doublings)
        lo, hi = np.minimum(extrapolated.lo, 0), np.maximum(extrapolated.hi, 0)
        assert decision.spec is not None  # _obstacle
        wide = decision.spec.bits > 8
        groups = [np.arange(len(lo))] if wide else self._groups(hi - lo)
        if len(groups) == 1:
            ctx.ranges.set(decision.tensor, Range(lo.min(), hi.max()))
            why = f"{decision.spec.bits} bits are fine enough" if wide else "groups would not help"
            ctx.skip(decision.tensor, f"{why}: one scale")
            return
        for group in groups:
            lo[group], hi[group] = lo[group].min(), hi[group].max()
        spec = replace(decision.spec, granularity="channel", axis=-1)
        ctx.ranges.set(decision.tensor, Range(lo, hi, -1))
        why = f"{decision.reason}; {len(groups)} groups of channels"
        ctx.plan.replace(decision, spec=spec, reason=why)

    def _groups(self, width: Array) -> list[Array]:
        """Indices of the channels of each group, widest group first; ``width`` (channels,)."""
        order = np.argsort(-width, kind="stable")
        if self.groups:
            return [p for p in np.array_split(order, self.groups) if len(p)]
        ranked = width[order].astype(np.float64)
        borders = _best_borders(ranked, self.limit, int(len(order) * self.most), self.slack)
        return np.split(order, borders)


def _sample_obstacle(stats: ChannelStats | None) -> Refusal | None:
    if stats is None:
        return Refusal("its channels were not sampled")
    if len(stats.rows) < FEWEST_ROWS:
        return Refusal(f"{len(stats.rows)} rows are too few to judge its channels")
    return None


def _obstacle(decision: Decision, tensor: Tensor | None) -> Refusal | None:
    if tensor is None or not tensor.shape or not isinstance(tensor.shape[-1], int):
        return Refusal("its last axis has no fixed size")
    if len(tensor.shape) < 2 or tensor.shape[-1] < 2:
        return Refusal("it has no channels")
    if decision.spec is None or decision.spec.granularity != "tensor":
        return Refusal("it already has several scales")
    return None


def _best_borders(ranked: Array, limit: int, most: int, slack: float) -> list[int]:
    """Where to divide widths, sorted descending, into at most ``limit`` groups.

    Minimizes ``sum(size · widest²)`` by dynamic programming over a grid of positions, which is fine
    among the widest channels; then takes the fewest groups within ``slack`` of the minimum.
    """
    steps = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
    grid = [0, *(p for p in steps if p <= most and p < len(ranked)), len(ranked)]
    # cost[i, j]: error of one group from grid[i] to grid[j]
    cost = {(i, j): (grid[j] - grid[i]) * ranked[grid[i]] ** 2
            for i in range(len(grid)) for j in range(i + 1, len(grid))}  # fmt: skip
    last = len(grid) - 1
    # best[k][j]: least error of k groups up to grid[j], and the ends of these groups
    best: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]
    totals: list[tuple[float, list[int]]] = []
    for _ in range(limit):
        row: dict[int, tuple[float, list[int]]] = {}
        for j in range(1, len(grid)):
            options = [
                (error + cost[i, j], [*borders, grid[j]])
                for i, (error, borders) in best[-1].items()
                if i < j
            ]
            if options:
                row[j] = min(options)
        best.append(row)
        if last in row:
            totals.append((row[last][0], row[last][1][:-1]))
    least = min(error for error, _ in totals)
    return next(borders for error, borders in totals if error <= least * slack)
