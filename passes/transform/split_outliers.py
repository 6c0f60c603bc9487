"""Gives channels with a wide range several uint8 columns, so that the others keep a fine step.

    x → Linear(W)   →   Clip([x, x_o] - [0, kR]) → Linear([W; W_o])     k = 1, 2, ...

One scale must cover a whole tensor, so a few wide channels coarsen it for all. Here the range
[L, H] = [L, L + R] covers all channels but those; an outlier channel o reads on in further columns,
its values moved down by R each time, with the same weights. Saturation makes the sum telescope:

    clip(x, L, H) + (clip(x - R, L, H) - L) + (clip(x - 2R, L, H) - L) + ... = x

and likewise below with x + kR and H. The constants L and H go into the bias, multiplied by the
weight as it will be quantized. R is 255 steps, so an outlier is quantized at the step of the rest:
neither its weights nor anybody's grow, as they do where a scale moves into the weights. This is
outlier channel splitting (Zhao et al. 2019) with offsets in place of halves.

The further columns of an activation function's result come from further columns of the linear
layer before it; elsewhere a Gather and a Concat make them, and where an outlier's own weights are
small its step may be wider: then a Mul comes first. Weights whose pairs of rows are bounded stay
so: the columns are ordered such that rows that end up side by side fit, which copies of one channel
seldom do, and a column that fits nowhere gets one beside it whose weights are zero. Refuses sites
without a sample, quantizers per channel, few channels (a column costs the more, the fewer there
are) and gains below ``least_gain``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_op, rank
from qcompile.ir.operators import ACTIVATIONS
from qcompile.planning import Context, LinearGroup, QuantizedLinear, Use, add_to_bias, linear_groups
from qcompile.quant import (
    PAIR_SUM,
    Array,
    ChannelStats,
    QParams,
    QSpec,
    Range,
    Rounded,
    dequantize,
    nearest,
    qparams,
    worst_sums,
)
from qcompile.rewriting import Numerics, Pass, Stage

_FEWEST = 4  # columns to offer narrow layers: one step of ONNX Runtime's integer kernels
_HALVINGS = 30


@dataclass(frozen=True)
class Split:
    """Columns to append: channel, division by ``factor`` and ``copies`` times the span, each (n,).

    ``params`` quantize all columns; ``low`` and ``high`` are where they saturate. ``blank``:
    columns that are there for their place alone, with weights of zero, None where there are none.
    """

    channels: Array
    factors: Array
    copies: Array
    params: QParams
    blank: Array | None = None

    @property
    def low(self) -> float:
        return (self.params.spec.limits[0] - int(self.params.zero_point)) * float(self.params.scale)

    @property
    def high(self) -> float:
        return (self.params.spec.limits[1] - int(self.params.zero_point)) * float(self.params.scale)

    @property
    def span(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Split outlier channels of linear inputs over several columns.

    share: columns to append, in parts of the channels. doublings: how often the data is thought to
    double until all is seen. least_gain: the step must shrink by this factor at least.
    least_channels: fewer are left alone.
    """

    name: ClassVar[str] = "split-outliers"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("permute-channels", "round-weights", "correct-bias")

    share: float = 1 / 24
    doublings: float = 4.0
    least_gain: float = 1.25
    least_channels: int = 1024

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return (site.data for site in linear_groups(graph, ctx))

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for site in linear_groups(graph, ctx):
            maker = _maker(graph, site)
            found = self._split(ctx, site, steady=maker is not None)
            if isinstance(found, Refusal):
                ctx.skip(site.data, found.reason)
            else:
                _apply(graph, ctx, site, _paired_up(ctx, site, found), maker)
                changed = True
        return changed

    def _split(self, ctx: Context, site: LinearGroup, *, steady: bool) -> Split | Refusal:
        """What to append, or why nothing."""
        stats, spec = ctx.channels.get(site.data), site.spec
        if stats is None:
            return Refusal("its channels were not sampled")
        if spec is None or spec.granularity != "tensor" or spec.symmetric:
            return Refusal("it has no quantizer of its own with one scale and a zero point")
        if any(linear.transposed for linear in site.linears):
            return Refusal("a weight is transposed")
        if len(stats.lo) < self.least_channels:
            return Refusal(
                f"{len(stats.lo)} channels are few: more columns would cost too much time"
            )
        weights = [_rounded(ctx, linear) for linear in site.linears]
        room = np.ones(len(stats.lo)) if steady else _room(weights)
        return self._search(stats, spec, room)

    def _search(self, stats: ChannelStats, spec: QSpec, room: Array) -> Split | Refusal:
        foreseen = stats.extrapolated(self.doublings)
        lo = np.minimum(foreseen.lo.astype(np.float64), 0)
        hi = np.maximum(foreseen.hi.astype(np.float64), 0)
        budget = max(_FEWEST, int(len(lo) * self.share))
        plain = qparams(_span(lo.min(), hi.max()), spec)
        best: Split | None = None
        # The narrowest range whose outliers fit the budget: columns only grow as it shrinks.
        low, high = 0.0, float(max(-lo.min(), hi.max()))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = _columns(lo, hi, middle, spec, room)
            if len(found.channels) <= budget:
                best, high = found, middle
            else:
                low = middle
        gain = float(plain.scale) / float(best.params.scale) if best is not None else 1.0
        if best is None or gain < self.least_gain or len(best.channels) == 0:
            return Refusal(f"no outliers: {budget} more columns shrink the step {gain:.2f} times")
        return best


def _rounded(ctx: Context, linear: QuantizedLinear) -> Rounded:
    name = linear.weight.name
    return ctx.rounded_as(name, linear.spec) or nearest(array(linear.weight), linear.spec)


def _room(weights: list[Rounded]) -> Array:
    """How far each channel's step may grow, (channels,), at least 1.

    Its noise is step² · |w|², so small weights allow for a large step: up to the mean noise of a
    channel, and as long as the larger weights fit the scales that are there.
    """
    real = np.concatenate([dequantize(w.values, w.params) for w in weights], axis=1)
    energy = np.square(real, dtype=np.float64).sum(1)
    parity = np.sqrt(energy.mean() / np.maximum(energy, np.finfo(np.float32).tiny))
    peaks = [np.abs(w.values.astype(np.int32)).max(1) for w in weights]
    limit = min(w.params.spec.limits[1] for w in weights)
    fits = limit / np.maximum(np.max(peaks, axis=0), 1)
    room: Array = np.maximum(np.minimum(parity, fits), 1.0)
    return room


def _span(low: float, high: float) -> Range:
    return Range(np.array(low), np.array(high))


def _columns(lo: Array, hi: Array, width: float, spec: QSpec, room: Array) -> Split:
    """The columns that channels need once the shared range is cut to [-width, width]."""
    params = qparams(_span(max(lo.min(), -width), min(hi.max(), width)), spec)
    made = Split(np.zeros(0, np.int64), np.ones(0), np.zeros(0), params)
    need = np.maximum(hi / max(made.high, 1e-30), lo / min(made.low, -1e-30))
    channels, factors, copies = [], [], []
    slack = 0.5 * float(params.scale)  # rounding ends within half a step of the bound
    for j in np.flatnonzero((hi > made.high + slack) | (lo < made.low - slack)):
        factor = float(min(room[j], need[j])) if room[j] >= 2 else 1.0
        above = max(0, int(np.ceil((hi[j] / factor - made.high - slack) / made.span)))
        below = max(0, int(np.ceil((made.low - lo[j] / factor - slack) / made.span)))
        steps = [*range(1, above + 1), *range(-below, 0)] + ([0] if factor > 1 else [])
        channels += [j] * len(steps)
        factors += [factor] * len(steps)
        copies += steps
    return Split(np.array(channels, np.int64), np.array(factors), np.array(copies), params)


@dataclass(frozen=True)
class _Maker:
    """What computes a site's tensor: an activation function over a linear layer with a bias."""

    linear: Node
    bias: Node | None
    function: Node


def _maker(graph: Graph, site: LinearGroup) -> _Maker | None:
    """The layer whose outputs become the site's channels one by one, None where that is not so."""
    function = graph.producer(site.tensor)
    readers = {id(n) for n in graph.consumers(site.tensor)}
    alone = readers == {id(linear.node) for linear in site.linears}
    if function is None or not alone or graph.is_output(site.tensor):
        return None
    if not is_op(function, *ACTIVATIONS) or len(function.inputs) != 1:
        return None
    bias = graph.producer(function.inputs[0])
    linear = bias
    if bias is not None and is_op(bias, "Add"):
        inner = [t for t in bias.inputs if not is_constant(t)]
        fits = any(is_constant(t) and rank(t) == 1 for t in bias.inputs)
        linear = graph.producer(inner[0]) if len(inner) == 1 and fits else None
    if linear is None or bias is None or not is_op(linear, "MatMul"):
        return None
    weight, between = linear.inputs[1], (linear, *([bias] if bias is not linear else []))
    seen = any(graph.only_consumer(n.outputs[0]) is None for n in between)
    if seen or not is_constant(weight) or rank(weight) != 2:
        return None
    return _Maker(linear, bias if bias is not linear else None, function)


def _appended_rows(ctx: Context, linear: QuantizedLinear, split: Split) -> Array:
    """Integers of the appended columns' weights, (n, outputs): their channels', or finer."""
    rounded, weight = _rounded(ctx, linear), array(linear.weight)
    limit, scaled = rounded.params.spec.limits[1], split.factors != 1
    rows = rounded.values[split.channels]
    exact = weight[split.channels[scaled]] * split.factors[scaled, None] / rounded.params.scale
    rows[scaled] = np.clip(np.rint(exact), -limit, limit).astype(rows.dtype)
    if split.blank is not None:
        rows[split.blank] = 0
    return rows


def _paired_up(ctx: Context, site: LinearGroup, split: Split) -> Split:
    """The same columns in an order in which rows side by side keep the bound on pairs.

    Columns whose rows fit no other's get a blank one beside them, but for the last column; so does
    a last row of the body that has no partner yet.
    """
    bounded = [linear for linear in site.linears if linear.spec.paired]
    if not bounded:
        return split
    rows = np.concatenate([_appended_rows(ctx, linear, split) for linear in bounded], axis=1)
    places: list[tuple[int, bool]] = []  # (column, whether it is blank)
    if array(bounded[0].weight).shape[0] % 2:
        places.append((0, True))
    matched = sorted(_matched(rows), key=lambda pair: pair[1] is None)  # those alone last
    for first, second in matched:
        places += [(first, False), (first if second is None else second, second is None)]
    if places[-1][1]:
        places.pop()
    order = np.array([column for column, _ in places], np.int64)
    return Split(
        split.channels[order],
        split.factors[order],
        split.copies[order],
        split.params,
        np.array([blank for _, blank in places]),
    )


def _matched(rows: Array) -> list[tuple[int, int | None]]:
    """Pairs of rows, integers (n, outputs), that may stand side by side; None beside the others.

    Greedy, those with the fewest possible partners first.
    """
    fits = np.array(
        [worst_sums(row.astype(np.int16), rows.astype(np.int16)).max(1) <= PAIR_SUM for row in rows]
    )
    np.fill_diagonal(fits, False)
    found: list[tuple[int, int | None]] = []
    free = np.ones(len(rows), bool)
    for i in np.argsort(fits.sum(1), kind="stable"):
        if not free[i]:
            continue
        free[i] = False
        partners = np.flatnonzero(fits[i] & free)
        if len(partners) == 0:
            found.append((int(i), None))
            continue
        scarcest = partners[np.argmin(fits[partners][:, free].sum(1))]
        free[scarcest] = False
        found.append((int(i), int(scarcest)))
    return found


def _apply(
    graph: Graph, ctx: Context, site: LinearGroup, split: Split, maker: _Maker | None
) -> None:
    """Put the columns, their weights and the saturation's constants in place."""
    whole = _made(graph, ctx, site, split, maker) if maker else _gathered(graph, site, split)
    low = graph.constant(f"{site.data}/low", np.array(split.low, np.float32))
    high = graph.constant(f"{site.data}/high", np.array(split.high, np.float32))
    clip = graph.add("Clip", [whole, low, high], [f"{site.data}/split"], like=site.tensor)
    clipped = clip.outputs[0]
    clipped.shape = None
    for linear in site.linears:
        _extend_weight(graph, ctx, linear, split)
    site.redirect(graph, ctx, clipped)
    ctx.ranges.set(clipped.name, _span(split.low, split.high))


def _made(graph: Graph, ctx: Context, site: LinearGroup, split: Split, maker: _Maker) -> Tensor:
    """The columns from the layer before: its outputs for the outliers, once more."""
    weight = maker.linear.inputs[1]
    wider = np.concatenate([array(weight), array(weight)[:, split.channels]], axis=1)
    new = graph.set_constant(maker.linear, 1, wider, f"{weight.name}/wider")
    if weight.name in ctx.rounded:
        ctx.rounded[new.name] = _repeated(ctx.rounded[weight.name], split.channels)
    ctx.plan.move((Use(maker.linear.name, 1),), new.name)
    if maker.bias is not None:
        slot = next(i for i, t in enumerate(maker.bias.inputs) if is_constant(t))
        old = maker.bias.inputs[slot]
        values = np.broadcast_to(array(old), (len(array(weight)[0]),))
        values = np.concatenate([values, values[split.channels]])
        graph.set_constant(maker.bias, slot, values, f"{old.name}/wider")
    for node in (maker.linear, maker.bias, maker.function):
        if node is not None:  # as wide as before no more: another tensor, another name
            old_name = node.outputs[0].name
            graph.renew_output(node, "wider", np.float32)
            node.outputs[0].shape = None
            ctx.rename(old_name, node.outputs[0].name, same_channels=False)
    offsets = np.zeros(wider.shape[1], np.float32)
    offsets[-len(split.copies) :] = -split.copies * split.span
    moves = graph.constant(f"{site.data}/offsets", offsets)
    moved = graph.add("Add", [maker.function.outputs[0], moves], [f"{site.data}/moved"])
    moved.outputs[0].dtype = site.tensor.dtype
    return moved.outputs[0]


def _repeated(rounded: Rounded, channels: Array) -> Rounded:
    """A rounded weight with some of its output channels once more."""
    old, picked = rounded.params, channels
    scale = np.concatenate([old.scale, old.scale[picked]]) if old.per_axis else old.scale
    zero = (
        np.concatenate([old.zero_point, old.zero_point[picked]]) if old.per_axis else old.zero_point
    )
    values = np.concatenate([rounded.values, rounded.values[:, picked]], axis=1)
    return Rounded(values, QParams(scale, zero, old.spec))


def _gathered(graph: Graph, site: LinearGroup, split: Split) -> Tensor:
    """The columns by a Gather from the tensor itself."""
    x, base = site.tensor, site.data
    picked = graph.constant(f"{base}/outliers", split.channels)
    column = graph.add("Gather", [x, picked], [f"{base}/picked"], {"axis": -1}, like=x).outputs[0]
    if (split.factors != 1).any():
        column.shape = None
        scale = graph.constant(f"{base}/factors", (1 / split.factors).astype(np.float32))
        column = graph.add("Mul", [column, scale], [f"{base}/scaled"], like=x).outputs[0]
    moves = graph.constant(f"{base}/offsets", (-split.copies * split.span).astype(np.float32))
    moved = graph.add("Add", [column, moves], [f"{base}/moved"], like=x).outputs[0]
    whole = graph.add("Concat", [x, moved], [f"{base}/columns"], {"axis": -1}, like=x).outputs[0]
    for tensor in (column, moved, whole):
        tensor.shape = None
    return whole


def _extend_weight(graph: Graph, ctx: Context, linear: QuantizedLinear, split: Split) -> None:
    """Rows of the appended columns, and the bias that undoes their saturation."""
    rounded, rows = _rounded(ctx, linear), _appended_rows(ctx, linear, split)
    params, body = rounded.params, rounded.values.copy()
    # What is scaled lies in the appended columns, the first copy too.
    body[split.channels[split.factors != 1]] = 0
    values = np.concatenate([body, rows])
    real = dequantize(values, params)
    idle = np.where(split.copies > 0, split.low, np.where(split.copies < 0, split.high, 0.0))
    add_to_bias(graph, linear, -(idle @ real[len(body) :].astype(np.float64)))
    new = linear.set_weight(graph, ctx, real, f"{linear.weight.name}/split")
    ctx.rounded[new.name] = Rounded(values, params)
