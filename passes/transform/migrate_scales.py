"""Moves the range of wide channels from activations into weights.

    x → Linear(W)   →   x · (1/m) → Linear(diag(m) · W)

One scale must cover a whole tensor, so a few wide channels make its step coarse for all. Dividing
them by ``m_j`` narrows the tensor; in return, weight rows grow, and with them the steps of the
weights. Both errors follow from the statistics, for y = x W of one token with step s of the data
and steps t_o of the weights of output o:

    data:     s²/12 · sum_j m_j² |W_j|²                   s   = range(x / m) / 255
    weights:  sum_o t_o²/12 · sum_j E[x_j²] / m_j²        t_o = max_j m_j |W_jo| / 127

The candidates are ``m_j = max(1, width_j / T)`` for several T: T at the k-th widest channel is
per-embedding-group scaling (Bondarenko et al. 2021) with k groups of one channel and one group of
the rest; ``m_j = width_j ** a`` is SmoothQuant's migration (Xiao et al. 2022); with ``groups``, K
equal groups. The candidate with the least error is taken. The data's error counts less: it differs
between tokens and averages out in attention and pooling; the weights' is the same for all tokens.

Rows of weights of few bits get whole factors, 1, 2 or 4, by which they are multiplied after they
were rounded. That costs them nothing, where others would widen the steps of a whole block.

1/m goes into a LayerNormalization that nothing else reads, otherwise it becomes a Mul. Widths are
extrapolated to unseen data (``ChannelStats.extrapolated``). Refuses weights that are shared with
layers of other data: each would get a copy of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant
from qcompile.planning import Context, LinearGroup, linear_groups
from qcompile.quant import Array, ChannelStats, QSpec, Range, qparams
from qcompile.quant.rounding import SEVEN_BITS
from qcompile.rewriting import Numerics, Pass, Stage

_MOST_ROW_FACTOR = 4
_MULTIPLIERS = 4  # room that is left to multipliers of blocks


@dataclass(frozen=True)
class MigrateScales(Pass):
    """Scale channels so that data and weights are equally hard to quantize.

    groups: 0 searches, K takes K equal groups of the sorted channels. strength: 0 searches, else
    the only candidate is SmoothQuant with this exponent. doublings: ranges are extrapolated to the
    data doubled so many times. weight_penalty: weight of the weights' error relative to the data's.
    least_gain: the predicted error must shrink at least by this factor. least_error: linear groups
    with a smaller error, relative to the energy of their outputs or of the residual sum that these
    are added to, are left alone. most_channels: longer rows are left to split-outliers, whose
    columns cost less there than a Mul.
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
            total = _residual_sum(graph, site)
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
            return Refusal("it does not have its own quantizer with one scale")
        if any(linear.transposed for linear in site.linears):
            return Refusal("a weight is transposed")
        if len(stats.lo) > self.most_channels:
            return Refusal(f"{len(stats.lo)} channels: for so many, split-outliers costs less")
        return site.shared_weight(graph) or self._search(graph, ctx, site, stats, site.spec)

    def _search(
        self, graph: Graph, ctx: Context, site: LinearGroup, stats: ChannelStats, spec: QSpec
    ) -> Array | Refusal:
        weight = np.concatenate([array(linear.weight) for linear in site.linears], axis=1)
        most = _most_row_factor(site)
        penalty = self.weight_penalty if most is None else 0.0  # whole factors cost it nothing
        errors = _Errors(stats, spec, weight, self.doublings, penalty)
        unscaled = errors.of(np.ones(len(stats.lo), np.float32))
        share = unscaled / max(_signal(graph, ctx, site, stats, weight), 1e-30)
        if share < self.least_error:
            return Refusal(f"its error is small: {share:.1e} of the signal that it is added to")
        if most == 1:
            return Refusal("its weights have few bits and no room for factors of rows")
        best, least = None, unscaled
        candidates = self._candidates(errors.width, errors.balance)
        for factors in candidates if most is None else _whole(candidates, most):
            error = errors.of(factors)
            if error < least:
                best, least = factors, error
        if best is None or unscaled < least * self.least_gain:
            gain = unscaled / least
            return Refusal(
                f"scaling would help little: the predicted error shrinks only {gain:.2f} times"
            )
        return best

    def _candidates(self, width: Array, balance: Array) -> Iterator[Array]:
        """Factors (channels,) to compare; ``balance``: see ``_Errors``."""
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
                    yield np.maximum(outliers, share * balance)
        for strength in (0.2, 0.35, 0.5, 0.65, 0.8):
            yield ((width / middle) ** strength).astype(np.float32)


class _Errors:
    """Predicts the error of a linear group's outputs for given factors, up to a constant factor.

    ``balance``: the factors (channels,), median 1, that would minimize the sum of both errors if
    steps did not depend on them.
    """

    def __init__(
        self, stats: ChannelStats, spec: QSpec, weight: Array, doublings: float, penalty: float
    ) -> None:
        extrapolated = stats.extrapolated(doublings)
        self.lo, self.hi = np.minimum(extrapolated.lo, 0), np.maximum(extrapolated.hi, 0)
        self.width = np.maximum(np.maximum(-self.lo, self.hi), 1e-6)
        self.spec, self.weight, self.penalty = spec, np.abs(weight), penalty
        self.weight_energy = np.square(weight).sum(1)  # |W_j|² of each channel
        # Rows are scaled to length 1: what follows a linear layer is normalized.
        squared_lengths = _squared_lengths(stats.rows)
        self.moments = (np.square(stats.rows) / squared_lengths).mean(0)  # E[x_j²]
        self.tokens = float((1 / squared_lengths).mean())
        # minimizes sum_j m_j² |W_j|² + E[x_j²] / m_j²
        balance = np.sqrt(np.sqrt(self.moments / np.maximum(self.weight_energy, 1e-12)))
        self.balance = (balance / max(float(np.median(balance)), 1e-12)).astype(np.float32)

    def of(self, factors: Array) -> float:
        """The error of the module docstring's formulas; ``factors`` (channels,)."""
        low, high = (self.lo / factors).min(), (self.hi / factors).max()
        step = float(qparams(Range(low, high), self.spec).scale)
        data = step**2 / 12 * self.tokens * float((factors**2 * self.weight_energy).sum())
        steps = (self.weight * factors[:, None]).max(0) / 127
        noise = float(np.square(steps).sum()) / 12
        return data + self.penalty * noise * float((self.moments / factors**2).sum())


def _most_row_factor(site: LinearGroup) -> int | None:
    """The largest factor for rows of weights of few bits, a power of two; None without such.

    Such a row is multiplied after it was rounded, as an integer, so that its factor does not widen
    the steps of its whole block; values stay within 7 bits.
    """
    rooms = [
        SEVEN_BITS // (2 ** (width - 1) * (_MULTIPLIERS if linear.spec.block else 1))
        for linear in site.linears
        if (width := linear.spec.width) is not None
    ]
    return max(1, min(_MOST_ROW_FACTOR, *rooms)) if rooms else None


def _whole(candidates: Iterable[Array], most: int) -> Iterator[Array]:
    """Each candidate as powers of two from 1 to ``most``."""
    for factors in candidates:
        powers = np.exp2(np.ceil(np.log2(np.maximum(factors, 1))))
        yield np.minimum(powers, most).astype(np.float32)


def _squared_lengths(rows: Array) -> Array:
    """Squared length of each row, (n, 1)."""
    lengths: Array = np.square(rows).sum(1, keepdims=True) + np.float32(1e-12)
    return lengths


def _signal(
    graph: Graph, ctx: Context, site: LinearGroup, stats: ChannelStats, weight: Array
) -> float:
    """Mean energy of the outputs, or of the residual sum they are added to, per energy of a row."""
    total = _residual_sum(graph, site)
    sums = ctx.channels.get(total.name) if total is not None else None
    rows = sums.rows if sums is not None else stats.rows @ weight
    return float(_squared_lengths(rows).mean() / _squared_lengths(stats.rows).mean())


def _residual_sum(graph: Graph, site: LinearGroup) -> Tensor | None:
    """The residual sum that the output of a single linear layer is added to, None without one."""
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
    """The paper's groups: channels sorted by range, in K groups of equal size, a scale for each."""
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
    """Scale the data down and the weights up, and set the range of the scaled data."""
    inverse = (1 / factors).astype(np.float32)
    norm = _foldable(graph, site)
    if norm is not None:
        for slot in range(1, len(norm.inputs)):
            old = norm.inputs[slot]
            if old.name:
                graph.set_constant(norm, slot, array(old) * inverse, f"{old.name}/scaled")
        graph.renew_output(norm, "scaled", np.float32)
        scaled = norm.outputs[0]
    else:
        scale = graph.constant(f"{site.data}/factors", inverse)
        node = graph.add("Mul", [site.tensor, scale], [f"{site.data}/scaled"], like=site.tensor)
        scaled = node.outputs[0]
    for linear in site.linears:
        values = array(linear.weight) * factors[:, None]
        new = linear.set_weight(graph, ctx, values, f"{linear.weight.name}/scaled")
        if linear.spec.width is not None:
            ctx.row_factors[new.name] = factors.astype(np.uint8)
    site.redirect(graph, ctx, scaled)
    ctx.channels[scaled.name] = stats.scaled(inverse)
    span = stats.extrapolated(doublings).scaled(inverse)
    ctx.ranges.set(scaled.name, Range(span.lo.min(), span.hi.max()))


def _foldable(graph: Graph, site: LinearGroup) -> Node | None:
    """The LayerNormalization whose gamma and beta can take the factors; None where it has other
    readers or outputs, parameters that are not constant, or another axis than the last."""
    norm = graph.producer(site.tensor, "LayerNormalization")
    if norm is None:
        return None
    readers = {id(n) for n in graph.consumers(site.tensor)}
    exclusive = readers == {id(linear.node) for linear in site.linears}
    last = norm.attrs.get("axis", -1) in (-1, len(site.tensor.shape or ()) - 1)
    constant = all(is_constant(t) for t in norm.inputs[1:] if t.name)
    single = sum(bool(t.name) for t in norm.outputs) == 1
    fits = exclusive and last and constant and single and not graph.is_output(site.tensor)
    return norm if fits else None
