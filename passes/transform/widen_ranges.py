"""Extrapolates ranges to values that the calibration data does not contain.

    [lo, hi]   →   the extrema expected once the data has doubled ``doublings`` times

Few sentences do not excite every channel: on text of another kind ranges are wider, and values
outside are clipped, which changes the worst samples most. The tails of the channels' distributions
predict how much wider (``ChannelStats.tail``); a range grows as much as the largest extremum of its
channels. Steps are coarser by that factor, which costs little accuracy on average. Only activations
that linear layers read; others are not sampled by channel. Edits nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph
from qcompile.planning import Context, linear_groups
from qcompile.quant import ChannelStats, Range
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class WidenRanges(Pass):
    """Widen ranges to the values expected of unseen data.

    doublings: ranges are extrapolated to the data doubled so many times.
    """

    name: ClassVar[str] = "widen-ranges"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT

    doublings: float = 3.0

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return (site.data for site in linear_groups(graph, ctx))

    def run(self, graph: Graph, ctx: Context) -> bool:
        for site in linear_groups(graph, ctx):
            stats, span = ctx.channels.get(site.data), ctx.ranges.get(site.data)
            if stats is None or span is None:
                ctx.skip(site.data, "its channels were not sampled: the range stays as it is")
                continue
            ctx.ranges.set(site.data, _widened(span, stats, stats.extrapolated(self.doublings)))
        return False


def _widened(span: Range, measured: ChannelStats, extrapolated: ChannelStats) -> Range:
    """The calibrated range times the growth of the extrema, which it need not equal."""
    up = _growth(float(measured.hi.max()), float(extrapolated.hi.max()))
    down = _growth(-float(measured.lo.min()), -float(extrapolated.lo.min()))
    return Range(span.lo * down, span.hi * up, span.axis)


def _growth(measured: float, extrapolated: float) -> float:
    """The factor by which an end grows away from zero; 1 for an end on the other side of zero."""
    return max(extrapolated / measured, 1.0) if measured > 0 else 1.0
