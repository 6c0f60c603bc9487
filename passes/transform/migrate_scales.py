"""Moves the range of wide channels from activations into weights.

    x → Linear(W)   →   x · (1/m) → Linear(diag(m) · W)

One scale must cover a whole tensor, so a few wide channels coarsen it for all. Dividing them by
``m_j`` narrows the tensor; the price are larger weight rows, which coarsen the weights. Both errors
follow from the statistics, for a product y = x W of one token, steps s (data) and t_o (output o):

    data:     s²/12 · sum_j m_j² |W_j|²                   s   = range(x / m) / 255
    weights:  sum_o t_o²/12 · sum_j E[x_j²] / m_j²        t_o = max_j m_j |W_jo| / 127

The candidates are ``m_j = max(1, width_j / T)`` for several T: T at the k-th widest channel is
per-embedding-group scaling (Bondarenko et al. 2021) with k groups of one and one for the rest;
``m_j = width_j ** a`` is SmoothQuant's migration (Xiao et al. 2022); ``groups`` wants K equal ones.
The best is taken, the data's error counting less: it differs from token to token and averages out
in attention and pooling, while the weights' is the same for all tokens.

1/m goes into a LayerNormalization or linear layer that nothing else reads, else it becomes a Mul.
Widths are those to foresee for unseen data (``ChannelStats.extrapolated``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant
from qcompile.planning import Context, LinearGroup, linear_groups
from qcompile.quant import Array, ChannelStats, QSpec, Range, qparams
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class MigrateScales(Pass):
    """Scale channels so that data and weights are equally hard to quantize.

    groups: 0 searches, K takes K equal groups of the sorted channels. strength: 0 searches, else
    SmoothQuant's exponent alone. doublings: how often the data is thought to double until all
    is seen. weight_penalty: what a weight's error counts against the data's. least_gain: the
    predicted error must shrink by this factor, or the site is left alone; as is one whose error is
    below ``least_error`` of the energy of its outputs, or of the residual sum that they go into.
    most_channels: longer rows are for split-outliers, whose columns cost less there than a Mul.
    """

    name: ClassVar[str] = "migrate-scales"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("permute-channels", "widen-ranges")

    groups: int = 0
    strength: float = 0.0
    doublings: float = 4.0
    weight_penalty: float = 3.0
    least_gain: float = 1.5
    least_error: float = 1e-3
    most_channels: int = 1023

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        for site in linear_groups(graph, ctx):
            yield site.data
            total = _sum_behind(graph, site)
            if total is not None:
                yield total.name

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for site in linear_groups(graph, ctx):
            stats = ctx.channels.get(site.data)
            factors = self._factors(graph, ctx, site, stats)
            if isinstance(factors, Refusal):
                ctx.skip(site.data, factors.reason)
            elif stats is not None:
                _apply(graph, ctx, site, stats, factors, self.doublings)
                changed = True
        return changed

    def _factors(
        self, graph: Graph, ctx: Context, site: LinearGroup, stats: ChannelStats | None
    ) -> Array | Refusal:
        """The best factors (channels,), or why there are none."""
        if stats is None:
            return Refusal("its channels were not sampled")
        if site.spec is None or site.spec.granularity != "tensor":
            return Refusal("it has no quantizer of its own with one scale")
        if any(linear.transposed for linear in site.linears):
            return Refusal("a weight is transposed")
        if len(stats.lo) > self.most_channels:
            return Refusal(f"{len(stats.lo)} channels are many: split-outliers costs less")
        return self._search(graph, ctx, site, stats, site.spec)

    def _search(
        self, graph: Graph, ctx: Context, site: LinearGroup, stats: ChannelStats, spec: QSpec
    ) -> Array | Refusal:
        weight = np.concatenate([array(linear.weight) for linear in site.linears], axis=1)
        errors = _Errors(stats, spec, weight, self.doublings, self.weight_penalty)
        plain = errors.of(np.ones(len(stats.lo), np.float32))
        share = plain / max(_signal(graph, ctx, site, stats, weight), 1e-30)
        if share < self.least_error:
            return Refusal(f"its error is small: {share:.1e} of what it goes into")
        best, least = None, plain
        for factors in self._candidates(errors.width, errors.loudness):
            error = errors.of(factors)
            if error < least:
                best, least = factors, error
        if best is None or plain < least * self.least_gain:
            return Refusal(
                f"no scales would help: the predicted error shrinks {plain / least:.2f} times"
            )
        return best

    def _candidates(self, width: Array, loudness: Array) -> Iterator[Array]:
        ranked = np.sort(width)[::-1]
        middle = np.median(width)
        if self.groups:
            yield _equal_groups(width, self.groups)
            return
        if self.strength:
            yield ((width / middle) ** self.strength).astype(np.float32)
            return
        for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            if k < len(ranked):
                outliers = np.maximum(1, width / ranked[k]).astype(np.float32)
                yield outliers
                for share in (0.35, 0.5, 0.7, 1.0):
                    yield np.maximum(outliers, share * loudness)
        for strength in (0.2, 0.35, 0.5, 0.65, 0.8):
            yield ((width / middle) ** strength).astype(np.float32)


class _Errors:
    """Predicts the error of a site's products for given factors, up to a constant."""

    def __init__(
        self, stats: ChannelStats, spec: QSpec, weight: Array, doublings: float, penalty: float
    ) -> None:
        foreseen = stats.extrapolated(doublings)
        self.lo, self.hi = np.minimum(foreseen.lo, 0), np.maximum(foreseen.hi, 0)
        self.width = np.maximum(np.maximum(-self.lo, self.hi), 1e-6)
        self.spec, self.weight, self.penalty = spec, np.abs(weight), penalty
        self.rows = np.square(weight).sum(1)
        # A token counts by its direction: what follows a linear layer is normalized.
        length = _lengths(stats.rows)
        self.moments = (np.square(stats.rows) / length).mean(0)
        self.tokens = float((1 / length).mean())
        loud = np.sqrt(np.sqrt(self.moments / np.maximum(self.rows, 1e-12)))
        self.loudness = (loud / max(float(np.median(loud)), 1e-12)).astype(np.float32)

    def of(self, factors: Array) -> float:
        low, high = (self.lo / factors).min(), (self.hi / factors).max()
        step = float(qparams(Range(low, high), self.spec).scale)
        data = step**2 / 12 * self.tokens * float((factors**2 * self.rows).sum())
        steps = (self.weight * factors[:, None]).max(0) / 127
        noise = float(np.square(steps).sum()) / 12
        return data + self.penalty * noise * float((self.moments / factors**2).sum())


def _lengths(rows: Array) -> Array:
    """Squared length of each row, (n, 1)."""
    lengths: Array = np.square(rows).sum(1, keepdims=True) + np.float32(1e-12)
    return lengths


def _signal(
    graph: Graph, ctx: Context, site: LinearGroup, stats: ChannelStats, weight: Array
) -> float:
    """Mean energy that the error is to be compared with, per energy of a row of the data."""
    total = _sum_behind(graph, site)
    sums = ctx.channels.get(total.name) if total is not None else None
    rows = sums.rows if sums is not None else stats.rows @ weight
    return float(_lengths(rows).mean() / _lengths(stats.rows).mean())


def _sum_behind(graph: Graph, site: LinearGroup) -> Tensor | None:
    """The residual sum that a single linear layer goes into, None where there is none."""
    tensor, linears = site.linears[0].node.outputs[0], site.linears
    for _ in range(2):  # past the bias
        add = graph.only_consumer(tensor, "Add")
        if len(linears) > 1 or add is None:
            return None
        tensor = add.outputs[0]
        if not any(is_constant(t) for t in add.inputs):
            return tensor
    return None


def _equal_groups(width: Array, groups: int) -> Array:
    """The paper's groups: channels sorted by range, cut into K of one size, a scale for each."""
    order = np.argsort(width, kind="stable")
    factors = np.ones_like(width, np.float32)
    for part in np.array_split(order, groups):
        factors[part] = width[part].max()
    return factors / np.float32(max(float(np.median(factors)), 1e-12))


def _apply(
    graph: Graph,
    ctx: Context,
    site: LinearGroup,
    stats: ChannelStats,
    factors: Array,
    doublings: float,
) -> None:
    inverse = (1 / factors).astype(np.float32)
    maker = _foldable(graph, site)
    if maker is not None:
        for slot in range(1, len(maker.inputs)):
            old = maker.inputs[slot]
            if old.name:
                graph.set_constant(maker, slot, array(old) * inverse, f"{old.name}/scaled")
        graph.renew_output(maker, "scaled", np.float32)
        scaled = maker.outputs[0]
    else:
        scale = graph.constant(f"{site.data}/factors", inverse)
        node = graph.add("Mul", [site.tensor, scale], [f"{site.data}/scaled"], like=site.tensor)
        scaled = node.outputs[0]
    for linear in site.linears:
        values = array(linear.weight) * factors[:, None]
        linear.set_weight(graph, ctx, values, f"{linear.weight.name}/scaled")
    site.redirect(graph, ctx, scaled)
    ctx.channels[scaled.name] = stats.scaled(inverse)
    span = stats.extrapolated(doublings).scaled(inverse)
    ctx.ranges.set(scaled.name, Range(span.lo.min(), span.hi.max()))


def _foldable(graph: Graph, site: LinearGroup) -> Node | None:
    """The LayerNormalization whose gamma and beta can carry the factors: nothing else reads it."""
    maker = graph.producer(site.tensor, "LayerNormalization")
    if maker is None:
        return None
    readers = {id(n) for n in graph.consumers(site.tensor)}
    alone = readers == {id(linear.node) for linear in site.linears}
    last = maker.attrs.get("axis", -1) in (-1, len(site.tensor.shape or ()) - 1)
    constant = all(is_constant(t) for t in maker.inputs[1:] if t.name)
    single = sum(bool(t.name) for t in maker.outputs) == 1
    return (
        maker
        if alone and last and constant and single and not graph.is_output(site.tensor)
        else None
    )
