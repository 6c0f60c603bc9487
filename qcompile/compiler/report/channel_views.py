"""The channels of quantized layers' inputs in quantizer steps, before and after the transforms.

Channels are sorted by width, widest first, and given in quantizer steps counted from the lowest
one: a channel that spans 12 of 255 steps keeps less than 4 bits. To stay small in a report,
channels are averaged in at most ``_BINS`` bins by rank, with small bins for the widest channels.
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
_MOST_SITES = 400  # a larger model keeps those with the widest outliers; about 1.5 kB each
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
    clipped: Annotated[int, "channels that are wider than the quantizer's range"]
    groups: Annotated[list[StepGroup], "the widest first"]
    lows: Annotated[list[float], "lower ends of the channels, the mean of each bin"]
    highs: Annotated[list[float], "upper ends"]

    JSON = members("dtype low high steps median_steps clipped groups from=lows to=highs")


@dataclass(frozen=True)
class ChannelSite:
    """The input of one or more quantized layers: its channels as calibrated and as compiled."""

    tensor: str
    node: str
    role: Annotated[str, "of the outputs of the layers that read it"]
    layer: int | None
    readers: Annotated[int, "layers that read it"]
    channels: int
    columns: Annotated[int, "of data that the layers read in the compiled model"]
    passes: Annotated[list[str], "that changed it"]
    ends: Annotated[list[int], "where bins of channels end, the widest channels first"]
    before: ChannelView
    after: ChannelView


@dataclass(frozen=True)
class _Snapshot:
    """A site at one moment: extrema of its channels, float32 (channels,), and its quantizer."""

    tensor: str
    lo: Array
    hi: Array
    span: Range
    spec: QSpec

    @property
    def width(self) -> Array:
        """Width of each channel's range, extended to include zero, (channels,)."""
        wide: Array = np.maximum(self.hi, 0) - np.minimum(self.lo, 0)
        return wide


@dataclass
class _History:
    """One site from the first to the last snapshot; ``columns`` that the layers finally read.

    ``parts``: rows and range of each layer, after a layer was split by groups of channels.
    """

    node: str
    role: Role
    readers: int
    channels: int
    first: _Snapshot
    last: _Snapshot
    columns: int
    parts: list[tuple[int, Range]] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)


@dataclass
class ChannelWatch:
    """An instrument that takes snapshots around the passes of the transform stage."""

    histories: dict[str, _History] = field(default_factory=dict)
    _started: bool = False

    def before(self, item: Pass, graph: Graph, ctx: Context) -> None:
        if self._started:
            return
        self._started = True
        found = roles(graph)
        for site in linear_groups(graph, ctx):
            snapshot = _snapshot(ctx, site, None)
            if snapshot is not None:
                node = site.linears[0].node.name
                channels = len(snapshot.lo)
                role = _role(site, found)
                self.histories[node] = _History(
                    node, role, len(site.linears), channels, snapshot, snapshot, channels
                )

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        by_node = {site.linears[0].node.name: site for site in linear_groups(graph, ctx)}
        for history in self.histories.values():
            site = by_node.get(history.node)
            if site is None:
                self._record_split(history, item, by_node, ctx)
                continue
            snapshot = _snapshot(ctx, site, history.last)
            if snapshot is not None and _differs(snapshot, history.last):
                history.last = snapshot
                history.columns = _rows(site)
                history.passes.append(item.name)

    def _record_split(
        self, history: _History, item: Pass, by_node: dict[str, LinearGroup], ctx: Context
    ) -> None:
        """Record a layer that was split into one per group of channels, named after it."""
        parts = []
        for name, site in by_node.items():
            span = ctx.ranges.get(site.data)
            if name.startswith(f"{history.node}/") and span is not None and span.axis is None:
                parts.append((_rows(site), span))
        if parts and not history.parts and sum(n for n, _ in parts) == history.channels:
            history.parts = parts
            history.passes.append(item.name)

    def sites(self) -> list[ChannelSite]:
        """In the order of the graph; if there are very many, only the worst ones."""
        sites = [_site(s) for s in self.histories.values()]
        if len(sites) > _MOST_SITES:
            worst = sorted(sites, key=lambda s: s.before.median_steps)[:_MOST_SITES]
            reported = {id(s) for s in worst}
            sites = [s for s in sites if id(s) in reported]
        return sites


def _snapshot(ctx: Context, site: LinearGroup, last: _Snapshot | None) -> _Snapshot | None:
    """A site as it is now; extrema are those of ``last`` if there are no newer ones."""
    stats, span = ctx.channels.get(site.data), ctx.ranges.get(site.data)
    if span is None or site.spec is None:
        return None
    if stats is not None:
        return _Snapshot(site.data, stats.lo, stats.hi, span, site.spec)
    return None if last is None else _Snapshot(site.data, last.lo, last.hi, span, site.spec)


def _differs(new: _Snapshot, old: _Snapshot) -> bool:
    same = (new.tensor, new.spec) == (old.tensor, old.spec) and new.lo is old.lo
    return not (same and _equal(new.span, old.span))


def _equal(a: Range, b: Range) -> bool:
    return a.axis == b.axis and np.array_equal(a.lo, b.lo) and np.array_equal(a.hi, b.hi)


def _rows(site: LinearGroup) -> int:
    """How many columns of data the layers of a site read."""
    linear = site.linears[0]
    return int(linear.weight.shape[1 if linear.transposed else 0])


def _role(site: LinearGroup, role_of: dict[str, Role]) -> Role:
    """The role of the outputs of its layers, from the roles of their weights."""
    own = [role_of[li.weight.name] for li in site.linears if li.weight.name in role_of]
    names = [n.removesuffix(_WEIGHT) for role in own for n in role.names]
    return Role(tuple(dict.fromkeys(names)), next((r.layer for r in own), None))


# ---- for the report


def _site(history: _History) -> ChannelSite:
    last = _grouped(history.last, history.parts) if history.parts else history.last
    return ChannelSite(
        tensor=history.first.tensor,
        node=history.node,
        role=", ".join(history.role.names),
        layer=history.role.layer,
        readers=history.readers,
        channels=history.channels,
        columns=history.columns,
        passes=history.passes,
        ends=_ends(history.channels),
        before=_view(history.first),
        after=_view(last),
    )


def _grouped(snapshot: _Snapshot, parts: Sequence[tuple[int, Range]]) -> _Snapshot:
    """One quantizer per group of neighbouring channels, shown as one with a scale per channel."""
    lo = np.concatenate([np.full(n, span.lo) for n, span in parts])
    hi = np.concatenate([np.full(n, span.hi) for n, span in parts])
    spec = replace(snapshot.spec, granularity="channel", axis=-1)
    return replace(snapshot, span=Range(lo, hi, -1), spec=spec)


def _view(snapshot: _Snapshot) -> ChannelView:
    """Bins of channels in steps, and the groups that share a scale, widest first."""
    params = qparams(snapshot.span, snapshot.spec)
    scale = np.broadcast_to(params.scale, snapshot.lo.shape).astype(np.float64)
    zero = np.broadcast_to(params.zero_point, snapshot.lo.shape).astype(np.float64)
    bottom, top = snapshot.spec.limits
    order = np.lexsort((-snapshot.width, -scale))  # by scale, then by width, both descending
    # Each channel's range in steps of its scale, clipped to the integer type, lowest step 0.
    low, high = (
        np.clip(np.minimum(snapshot.lo, 0) / scale + zero, bottom, top)[order] - bottom,
        np.clip(np.maximum(snapshot.hi, 0) / scale + zero, bottom, top)[order] - bottom,
    )
    ends = _ends(len(order))
    starts = [0, *ends[:-1]]
    sizes = np.diff([0, *ends])
    return ChannelView(
        dtype=snapshot.spec.dtype,
        low=float(snapshot.span.lo.min()),
        high=float(snapshot.span.hi.max()),
        steps=top - bottom,
        median_steps=round(float(np.median(high - low)), 1),
        clipped=int(np.count_nonzero((snapshot.width[order] / scale[order]) > (top - bottom + 1))),
        groups=_groups(scale[order]),
        lows=_means(low, starts, sizes),
        highs=_means(high, starts, sizes),
    )


def _groups(scale: Array) -> list[StepGroup]:
    steps, counts = np.unique(scale, return_counts=True)
    pairs = sorted(zip(steps.tolist(), counts.tolist(), strict=True), reverse=True)
    return [StepGroup(n, step) for step, n in pairs]


def _ends(channels: int) -> list[int]:
    """Where bins end: equal on a square-root scale, so that a single outlier has its own bin."""
    # Squares of equally spaced numbers, scaled to the channels and rounded up.
    ranks = np.ceil((np.arange(1, _BINS + 1) / _BINS) ** 2 * channels - 1e-9)
    return [int(r) for r in np.unique(ranks) if r > 0]


def _means(values: Array, starts: Sequence[int], sizes: Array) -> list[float]:
    return [round(float(v), 1) for v in np.add.reduceat(values, starts) / sizes]
