"""Gives channels with a wide range several uint8 columns, so that the others keep a fine step.

    x → Linear(W)   →   Clip([x, x_o] - [0, kR]) → Linear([W; W_o])     k = 1, 2, ...

One scale must cover a whole tensor, so a few wide channels make its step coarse for all. Here the
range [L, H] = [L, L + R] covers all channels except those; an outlier channel o continues in
additional columns, each shifted down by another R, with the same weights. With saturation, the sum
telescopes:

    clip(x, L, H) + (clip(x - R, L, H) - L) + (clip(x - 2R, L, H) - L) + ... = x

and likewise below with x + kR and H. The constants L and H go into the bias, multiplied by the
weight as it will be quantized. R is 255 steps, so an outlier is quantized with the step of the
other channels, and no weights grow, as they do where a scale moves into the weights. This is
outlier channel splitting (Zhao et al. 2019) with offsets instead of halves.

If the tensor is the result of an activation function after a linear layer, that layer computes the
additional columns; otherwise a Gather and a Concat do. There, an outlier with small weights may
have a wider step: a Mul comes first. Where the sums of pairs of weight rows are bounded (int16
saturation), they stay bounded: columns are ordered so that neighbouring rows keep the bound, which
copies of one channel seldom do, and a column without such a neighbour gets a blank one with zero
weights. Refuses linear groups without a sample, per-channel quantizers, few channels (the fewer,
the more a column costs relatively) and gains below ``least_gain``.
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
    qparams,
    worst_sums,
)
from qcompile.quant.rounding import nearest
from qcompile.rewriting import Numerics, Pass, Stage

_FEWEST_COLUMNS = 4  # budget of narrow layers: one step of ONNX Runtime's int8 kernels
_BISECTIONS = 30


@dataclass(frozen=True)
class Split:
    """Columns to append: ``x[channels] / factors - copies * span``, each (n,).

    ``params`` quantize all columns, which saturate at ``low`` and ``high``. ``blank``: True for
    columns that are only padding, with zero weights; None where there are none.
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

    share: most columns to append, relative to the number of channels. doublings: ranges are
    extrapolated to the data doubled so many times. least_gain: the step must shrink at least by
    this factor. least_channels: tensors with fewer channels are left alone.
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
            source = _source(graph, site)
            one_step = source is not None
            split = site.shared_weight(graph) or self._split(ctx, site, one_step=one_step)
            if isinstance(split, Refusal):
                ctx.skip(site.data, split.reason)
            else:
                _apply(graph, ctx, site, _paired(ctx, site, split), source)
                changed = True
        return changed

    def _split(self, ctx: Context, site: LinearGroup, *, one_step: bool) -> Split | Refusal:
        """The columns to append, or why there are none; ``one_step``: all with the same step."""
        stats, spec = ctx.channels.get(site.data), site.spec
        if stats is None:
            return Refusal("its channels were not sampled")
        if spec is None or spec.granularity != "tensor" or spec.symmetric:
            return Refusal("it does not have its own quantizer with one scale and a zero point")
        if any(linear.transposed for linear in site.linears):
            return Refusal("a weight is transposed")
        if len(stats.lo) < self.least_channels:
            return Refusal(
                f"{len(stats.lo)} channels: for so few, more columns would cost too much time"
            )
        weights = [_rounded(ctx, linear) for linear in site.linears]
        # A row of few bits is repeated as it is, so that the file holds it once.
        few_bits = any(linear.spec.width is not None for linear in site.linears)
        fixed = one_step or few_bits
        step_limits = np.ones(len(stats.lo)) if fixed else _step_limits(weights)
        return self._search(stats, spec, step_limits)

    def _search(self, stats: ChannelStats, spec: QSpec, step_limits: Array) -> Split | Refusal:
        """The split with the smallest step within the budget of columns."""
        extrapolated = stats.extrapolated(self.doublings)
        lo = np.minimum(extrapolated.lo.astype(np.float64), 0)
        hi = np.maximum(extrapolated.hi.astype(np.float64), 0)
        budget = max(_FEWEST_COLUMNS, int(len(lo) * self.share))
        unsplit = qparams(_span(lo.min(), hi.max()), spec)
        best: Split | None = None
        # Bisection for the narrowest range within the budget: a narrower one needs more columns.
        low, high = 0.0, float(max(-lo.min(), hi.max()))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            split = _columns(lo, hi, middle, spec, step_limits)
            if len(split.channels) <= budget:
                best, high = split, middle
            else:
                low = middle
        gain = float(unsplit.scale) / float(best.params.scale) if best is not None else 1.0
        if best is None or gain < self.least_gain or len(best.channels) == 0:
            return Refusal(
                f"no outliers: {budget} more columns would shrink the step only {gain:.2f}-fold"
            )
        return best


def _rounded(ctx: Context, linear: QuantizedLinear) -> Rounded:
    name = linear.weight.name
    return ctx.rounded_as(name, linear.spec) or nearest(array(linear.weight), linear.spec)


def _step_limits(weights: list[Rounded]) -> Array:
    """The factor by which each channel's step may grow, (channels,), at least 1.

    A channel's noise is step² · |w|², so small weights allow for a larger step: up to the mean
    noise of a channel, and as long as the weights, larger by that factor, fit their scales.
    """
    real = np.concatenate([dequantize(w.values, w.params) for w in weights], axis=1)
    energy = np.square(real, dtype=np.float64).sum(1)
    parity = np.sqrt(energy.mean() / np.maximum(energy, np.finfo(np.float32).tiny))
    peaks = [np.abs(w.values.astype(np.int32)).max(1) for w in weights]
    limit = min(w.params.spec.limits[1] for w in weights)
    fits = limit / np.maximum(np.max(peaks, axis=0), 1)
    limits: Array = np.maximum(np.minimum(parity, fits), 1.0)
    return limits


def _span(low: float, high: float) -> Range:
    return Range(np.array(low), np.array(high))


def _columns(lo: Array, hi: Array, width: float, spec: QSpec, step_limits: Array) -> Split:
    """The columns that channels need if the shared range is limited to [-width, width]."""
    params = qparams(_span(max(lo.min(), -width), min(hi.max(), width)), spec)
    base = Split(np.zeros(0, np.int64), np.ones(0), np.zeros(0), params)
    # how many times wider than the shared range each channel is
    excess = np.maximum(hi / max(base.high, 1e-30), lo / min(base.low, -1e-30))
    channels, factors, copies = [], [], []
    slack = 0.5 * float(params.scale)  # half a step beyond the bound is rounded, not clipped
    for j in np.flatnonzero((hi > base.high + slack) | (lo < base.low - slack)):
        factor = float(min(step_limits[j], excess[j])) if step_limits[j] >= 2 else 1.0
        # columns for the values above and below the range that all channels share
        above = max(0, int(np.ceil((hi[j] / factor - base.high - slack) / base.span)))
        below = max(0, int(np.ceil((base.low - lo[j] / factor - slack) / base.span)))
        steps = [*range(1, above + 1), *range(-below, 0)] + ([0] if factor > 1 else [])
        channels += [j] * len(steps)
        factors += [factor] * len(steps)
        copies += steps
    return Split(np.array(channels, np.int64), np.array(factors), np.array(copies), params)


@dataclass(frozen=True)
class _Source:
    """What computes a group's tensor: an activation function after a linear layer with a bias."""

    linear: Node
    bias: Node | None
    function: Node


def _source(graph: Graph, site: LinearGroup) -> _Source | None:
    """The layer whose outputs become the group's channels one by one, None where there is none."""
    function = graph.producer(site.tensor)
    readers = {id(n) for n in graph.consumers(site.tensor)}
    exclusive = readers == {id(linear.node) for linear in site.linears}
    if function is None or not exclusive or graph.is_output(site.tensor):
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
    shared = any(graph.only_consumer(n.outputs[0]) is None for n in between)
    if shared or not is_constant(weight) or rank(weight) != 2:
        return None
    if len(graph.consumers(weight)) > 1 or graph.is_output(weight):
        return None  # a wider one would be stored in addition
    return _Source(linear, bias if bias is not linear else None, function)


def _appended_rows(ctx: Context, linear: QuantizedLinear, split: Split) -> Array:
    """Quantized weights of the appended columns, (n, outputs).

    They are those of the channels, rounded again from the float weights where scaled by a factor.
    """
    rounded, weight = _rounded(ctx, linear), array(linear.weight)
    limit, scaled = rounded.params.spec.limits[1], split.factors != 1
    rows = rounded.values[split.channels]
    exact = weight[split.channels[scaled]] * split.factors[scaled, None] / rounded.params.scale
    rows[scaled] = np.clip(np.rint(exact), -limit, limit).astype(rows.dtype)
    if split.blank is not None:
        rows[split.blank] = 0
    return rows


def _paired(ctx: Context, site: LinearGroup, split: Split) -> Split:
    """The same columns, ordered so that pairs of neighbouring rows keep the bound on pairs.

    Columns without a partner get a blank one next to them, except the last column; so does the last
    of an odd number of original rows.
    """
    bounded = [linear for linear in site.linears if linear.spec.paired]
    if not bounded:
        return split
    rows = np.concatenate([_appended_rows(ctx, linear, split) for linear in bounded], axis=1)
    columns: list[tuple[int, bool]] = []  # (column, whether it is blank)
    if array(bounded[0].weight).shape[0] % 2:
        columns.append((0, True))
    pairs = sorted(_pairs(rows), key=lambda pair: pair[1] is None)  # rows without a partner last
    for first, second in pairs:
        columns += [(first, False), (first if second is None else second, second is None)]
    if columns[-1][1]:
        columns.pop()
    order = np.array([column for column, _ in columns], np.int64)
    return Split(
        split.channels[order],
        split.factors[order],
        split.copies[order],
        split.params,
        np.array([blank for _, blank in columns]),
    )


def _pairs(rows: Array) -> list[tuple[int, int | None]]:
    """Pairs of rows, int8 (n, outputs), that keep the bound; None as partner of the others.

    Greedy: rows with the fewest possible partners first.
    """
    # fits[i, j]: no sum of two products of rows i and j can leave int16
    fits = np.array(
        [worst_sums(row.astype(np.int16), rows.astype(np.int16)).max(1) <= PAIR_SUM for row in rows]
    )
    np.fill_diagonal(fits, False)
    pairs: list[tuple[int, int | None]] = []
    free = np.ones(len(rows), bool)
    for i in np.argsort(fits.sum(1), kind="stable"):
        if not free[i]:
            continue
        free[i] = False
        partners = np.flatnonzero(fits[i] & free)
        if len(partners) == 0:
            pairs.append((int(i), None))
            continue
        # the partner that has the fewest other partners left
        scarcest = partners[np.argmin(fits[partners][:, free].sum(1))]
        free[scarcest] = False
        pairs.append((int(i), int(scarcest)))
    return pairs


def _apply(
    graph: Graph, ctx: Context, site: LinearGroup, split: Split, source: _Source | None
) -> None:
    """Add the columns, the Clip that saturates them, and their weights."""
    whole = _widened(graph, ctx, site, split, source) if source else _gathered(graph, site, split)
    low = graph.constant(f"{site.data}/low", np.array(split.low, np.float32))
    high = graph.constant(f"{site.data}/high", np.array(split.high, np.float32))
    clip = graph.add("Clip", [whole, low, high], [f"{site.data}/split"], like=site.tensor)
    clipped = clip.outputs[0]
    clipped.shape = None
    for linear in site.linears:
        _extend_weight(graph, ctx, linear, split)
    site.redirect(graph, ctx, clipped)
    ctx.ranges.set(clipped.name, _span(split.low, split.high))
    ctx.fixed_ranges[clipped.name] = "channels are split over columns at its bounds"


def _widened(
    graph: Graph, ctx: Context, site: LinearGroup, split: Split, source: _Source
) -> Tensor:
    """All columns from the layer before, which repeats the output channels of the outliers."""
    weight = source.linear.inputs[1]
    wider = np.concatenate([array(weight), array(weight)[:, split.channels]], axis=1)
    new = graph.set_constant(source.linear, 1, wider, f"{weight.name}/wider")
    if weight.name in ctx.rounded:
        ctx.rounded[new.name] = _repeated(ctx.rounded[weight.name], split.channels)
    ctx.plan.move((Use(source.linear.name, 1),), new.name)
    if source.bias is not None:
        slot = next(i for i, t in enumerate(source.bias.inputs) if is_constant(t))
        old = source.bias.inputs[slot]
        values = np.broadcast_to(array(old), (len(array(weight)[0]),))
        values = np.concatenate([values, values[split.channels]])
        graph.set_constant(source.bias, slot, values, f"{old.name}/wider")
    for node in (source.linear, source.bias, source.function):
        if node is not None:  # another width: a new name for a different tensor
            old_name = node.outputs[0].name
            graph.renew_output(node, "wider", np.float32)
            node.outputs[0].shape = None
            ctx.rename(old_name, node.outputs[0].name, same_channels=False)
    offsets = np.zeros(wider.shape[1], np.float32)
    offsets[-len(split.copies) :] = -split.copies * split.span
    shifts = graph.constant(f"{site.data}/offsets", offsets)
    shifted = graph.add("Add", [source.function.outputs[0], shifts], [f"{site.data}/moved"])
    shifted.outputs[0].dtype = site.tensor.dtype
    return shifted.outputs[0]


def _repeated(rounded: Rounded, channels: Array) -> Rounded:
    """A rounded weight with some of its output channels appended again."""
    old = rounded.params
    scale, zero = old.scale, old.zero_point
    if old.per_axis:
        scale, zero = (np.concatenate([v, v[channels]]) for v in (scale, zero))
    values, steps = (
        None if part is None else np.concatenate([part, part[:, channels]], axis=1)
        for part in (rounded.values, rounded.steps)
    )
    assert values is not None
    return Rounded(values, QParams(scale, zero, old.spec), steps)


def _gathered(graph: Graph, site: LinearGroup, split: Split) -> Tensor:
    """All columns: the tensor, and a Gather of its outlier channels, scaled and shifted."""
    x, base = site.tensor, site.data
    picked = graph.constant(f"{base}/outliers", split.channels)
    column = graph.add("Gather", [x, picked], [f"{base}/picked"], {"axis": -1}, like=x).outputs[0]
    if (split.factors != 1).any():
        column.shape = None
        scale = graph.constant(f"{base}/factors", (1 / split.factors).astype(np.float32))
        column = graph.add("Mul", [column, scale], [f"{base}/scaled"], like=x).outputs[0]
    shifts = graph.constant(f"{base}/offsets", (-split.copies * split.span).astype(np.float32))
    shifted = graph.add("Add", [column, shifts], [f"{base}/moved"], like=x).outputs[0]
    whole = graph.add("Concat", [x, shifted], [f"{base}/columns"], {"axis": -1}, like=x).outputs[0]
    for tensor in (column, shifted, whole):
        tensor.shape = None
    return whole


def _extend_weight(graph: Graph, ctx: Context, linear: QuantizedLinear, split: Split) -> None:
    """Append the columns' rows to the weight; the bias subtracts what saturated columns add."""
    rounded, rows = _rounded(ctx, linear), _appended_rows(ctx, linear, split)
    params, body = rounded.params, rounded.values.copy()
    # Channels scaled by a factor are in the appended columns only.
    body[split.channels[split.factors != 1]] = 0
    values = np.concatenate([body, rows])
    real = dequantize(values, params)
    # the value of each appended column where its channel is inside the shared range
    idle = np.where(split.copies > 0, split.low, np.where(split.copies < 0, split.high, 0.0))
    add_to_bias(graph, linear, -(idle @ real[len(body) :].astype(np.float64)))
    new = linear.set_weight(graph, ctx, real, f"{linear.weight.name}/split")
    steps = rounded.steps  # of weights with steps, rows are repeated as they are
    if steps is not None:
        steps = np.concatenate([steps, steps[split.channels]])
    ctx.rounded[new.name] = Rounded(values, params, steps)
