"""What the inputs of integer layers look like to their quantizers, before and after the transforms.

Channels are sorted by width, widest first, and given in quantizer steps counted from the lowest
one: a channel that spans 12 of 255 steps keeps less than 4 bits. Both are small enough for a
report: at most ``_BINS`` bins of neighbours in rank, narrow ones for the widest channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np

from qcompile.ir import Graph
from qcompile.ir.analysis.transformer_roles import Role, roles
from qcompile.planning import Context, LinearGroup, linear_groups
from qcompile.quant import Array, QSpec, Range, qparams
from qcompile.rewriting import Pass
from qcompile.system.json_values import Record, members

_BINS = 48
_MOST_SITES = 400  # of larger models those with the widest outliers; about 1.5 kB each
_WEIGHT = "-weight"


@dataclass(frozen=True)
class StepGroup:
    """Channels that share one step of the quantizer."""

    channels: int
    step: float


@dataclass(frozen=True)
class ChannelView(Record):
    """Channels in steps of their quantizer at one moment, counted from its lowest step."""

    dtype: str
    low: float
    high: float
    steps: int
    median_steps: Annotated[float, "that the median channel spans"]
    clipped: Annotated[int, "channels that reach beyond the quantizer"]
    groups: Annotated[list[StepGroup], "the widest first"]
    lows: Annotated[list[float], "lower ends of the channels, the mean of each bin"]
    highs: Annotated[list[float], "upper ends"]

    JSON = members("dtype low high steps median_steps clipped groups from=lows to=highs")


@dataclass(frozen=True)
class ChannelSite:
    """The input of one or more integer layers: its channels as calibrated and as compiled."""

    tensor: str
    node: str
    role: Annotated[str, "what the layers that read it make"]
    layer: int | None
    readers: Annotated[int, "layers that read it"]
    channels: int
    columns: Annotated[int, "what the layers read in the end"]
    passes: Annotated[list[str], "that changed it"]
    ends: Annotated[list[int], "where bins of channels end, the widest channels first"]
    before: ChannelView
    after: ChannelView


@dataclass(frozen=True)
class _Seen:
    """A site at one moment: extrema of its channels, (channels,), and its quantizer."""

    tensor: str
    lo: Array
    hi: Array
    span: Range
    spec: QSpec

    @property
    def width(self) -> Array:
        """How much of the number line each channel takes, zero included."""
        wide: Array = np.maximum(self.hi, 0) - np.minimum(self.lo, 0)
        return wide


@dataclass
class _Story:
    """One site from first to last; ``columns``: what the layers read in the end."""

    node: str
    role: Role
    readers: int
    channels: int
    first: _Seen
    last: _Seen
    columns: int
    parts: list[tuple[int, Range]] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)


@dataclass
class ChannelWatch:
    """An instrument around the passes of the transform stage."""

    stories: dict[str, _Story] = field(default_factory=dict)
    _started: bool = False

    def before(self, item: Pass, graph: Graph, ctx: Context) -> None:
        if self._started:
            return
        self._started = True
        found = roles(graph)
        for site in linear_groups(graph, ctx):
            seen = _seen(ctx, site, None)
            if seen is not None:
                node = site.linears[0].node.name
                channels = len(seen.lo)
                role = _role(site, found)
                self.stories[node] = _Story(
                    node, role, len(site.linears), channels, seen, seen, channels
                )

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        by_node = {site.linears[0].node.name: site for site in linear_groups(graph, ctx)}
        for story in self.stories.values():
            site = by_node.get(story.node)
            if site is None:
                self._divided(story, item, by_node, ctx)
                continue
            seen = _seen(ctx, site, story.last)
            if seen is not None and _differs(seen, story.last):
                story.last = seen
                story.columns = _rows(site)
                story.passes.append(item.name)

    def _divided(
        self, story: _Story, item: Pass, by_node: dict[str, LinearGroup], ctx: Context
    ) -> None:
        """A layer that became one for each group of channels, named after it."""
        parts = []
        for name, site in by_node.items():
            span = ctx.ranges.get(site.data)
            if name.startswith(f"{story.node}/") and span is not None and span.axis is None:
                parts.append((_rows(site), span))
        if parts and not story.parts and sum(n for n, _ in parts) == story.channels:
            story.parts = parts
            story.passes.append(item.name)

    def sites(self) -> list[ChannelSite]:
        """In the order of the graph; of very many the worst ones only."""
        made = [_site(s) for s in self.stories.values()]
        if len(made) > _MOST_SITES:
            worst = sorted(made, key=lambda s: s.before.median_steps)[:_MOST_SITES]
            kept = {id(s) for s in worst}
            made = [s for s in made if id(s) in kept]
        return made


def _seen(ctx: Context, site: LinearGroup, known: _Seen | None) -> _Seen | None:
    """What is known of a site now; extrema of an earlier moment where no others are."""
    stats, span = ctx.channels.get(site.data), ctx.ranges.get(site.data)
    if span is None or site.spec is None:
        return None
    if stats is not None:
        return _Seen(site.data, stats.lo, stats.hi, span, site.spec)
    return None if known is None else _Seen(site.data, known.lo, known.hi, span, site.spec)


def _differs(new: _Seen, old: _Seen) -> bool:
    same = (new.tensor, new.spec) == (old.tensor, old.spec) and new.lo is old.lo
    return not (same and _equal(new.span, old.span))


def _equal(a: Range, b: Range) -> bool:
    return a.axis == b.axis and np.array_equal(a.lo, b.lo) and np.array_equal(a.hi, b.hi)


def _rows(site: LinearGroup) -> int:
    """How many columns of data the layers of a site read."""
    linear = site.linears[0]
    return int(linear.weight.shape[1 if linear.transposed else 0])


def _role(site: LinearGroup, found: dict[str, Role]) -> Role:
    """What its layers make, in words, and where."""
    known = [found[li.weight.name] for li in site.linears if li.weight.name in found]
    names = [n.removesuffix(_WEIGHT) for role in known for n in role.names]
    return Role(tuple(dict.fromkeys(names)), next((r.layer for r in known), None))


# ---- for the report


def _site(story: _Story) -> ChannelSite:
    last = _grouped(story.last, story.parts) if story.parts else story.last
    return ChannelSite(
        tensor=story.first.tensor,
        node=story.node,
        role=", ".join(story.role.names),
        layer=story.role.layer,
        readers=story.readers,
        channels=story.channels,
        columns=story.columns,
        passes=story.passes,
        ends=_ends(story.channels),
        before=_view(story.first),
        after=_view(last),
    )


def _grouped(seen: _Seen, parts: Sequence[tuple[int, Range]]) -> _Seen:
    """A quantizer for each group of neighbouring channels, as one with a scale a channel."""
    lo = np.concatenate([np.full(n, span.lo) for n, span in parts])
    hi = np.concatenate([np.full(n, span.hi) for n, span in parts])
    spec = replace(seen.spec, granularity="channel", axis=-1)
    return replace(seen, span=Range(lo, hi, -1), spec=spec)


def _view(seen: _Seen) -> ChannelView:
    """Bins of channels in steps, and the groups that share a scale, widest first."""
    params = qparams(seen.span, seen.spec)
    scale = np.broadcast_to(params.scale, seen.lo.shape).astype(np.float64)
    zero = np.broadcast_to(params.zero_point, seen.lo.shape).astype(np.float64)
    bottom, top = seen.spec.limits
    order = np.lexsort((-seen.width, -scale))
    low, high = (
        np.clip(np.minimum(seen.lo, 0) / scale + zero, bottom, top)[order] - bottom,
        np.clip(np.maximum(seen.hi, 0) / scale + zero, bottom, top)[order] - bottom,
    )
    ends = _ends(len(order))
    starts = [0, *ends[:-1]]
    sizes = np.diff([0, *ends])
    return ChannelView(
        dtype=seen.spec.dtype,
        low=float(seen.span.lo.min()),
        high=float(seen.span.hi.max()),
        steps=top - bottom,
        median_steps=round(float(np.median(high - low)), 1),
        clipped=int(np.count_nonzero((seen.width[order] / scale[order]) > (top - bottom + 1))),
        groups=_groups(scale[order]),
        lows=_means(low, starts, sizes),
        highs=_means(high, starts, sizes),
    )


def _groups(scale: Array) -> list[StepGroup]:
    steps, counts = np.unique(scale, return_counts=True)
    pairs = sorted(zip(steps.tolist(), counts.tolist(), strict=True), reverse=True)
    return [StepGroup(n, step) for step, n in pairs]


def _ends(channels: int) -> list[int]:
    """Where bins end: equal on a square-root scale, so that single outliers have their own."""
    ranks = np.ceil((np.arange(1, _BINS + 1) / _BINS) ** 2 * channels - 1e-9)
    return [int(r) for r in np.unique(ranks) if r > 0]


def _means(values: Array, starts: Sequence[int], sizes: Array) -> list[float]:
    return [round(float(v), 1) for v in np.add.reduceat(values, starts) / sizes]
