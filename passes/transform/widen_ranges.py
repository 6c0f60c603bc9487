"""Leaves room for values that the calibration data did not reach.

    [lo, hi]   →   the extrema to foresee once the data has doubled ``doublings`` times

Few sentences do not excite every channel: on text of another kind ranges are wider, and what lies
outside is clipped, which moves the worst answers most. How much wider is foretold by the tails of
the channels at hand (``ChannelStats.tail``); a range grows by the factor of the channel that ends
up the widest. Steps are coarser by that much, which costs the mean little. Only activations that
linear layers read; others are not sampled by channel. Edits nothing.
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
    """Widen ranges by what is to be expected of unseen data.

    doublings: how often the data is thought to double until all has been seen.
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


def _widened(span: Range, seen: ChannelStats, foreseen: ChannelStats) -> Range:
    """The calibrated range, which need not be the extrema, times how these grow."""
    up = _growth(float(seen.hi.max()), float(foreseen.hi.max()))
    down = _growth(-float(seen.lo.min()), -float(foreseen.lo.min()))
    return Range(span.lo * down, span.hi * up, span.axis)


def _growth(seen: float, foreseen: float) -> float:
    """How far an end moves away from zero; one that is not on its own side of it stays."""
    return max(foreseen / seen, 1.0) if seen > 0 else 1.0
