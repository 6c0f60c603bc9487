"""Sorts channels by their calibrated width, so that channels of like width lie side by side.

    y = LN(x·W + b)·V   →   y = LN(x·W[:, p] + b[p])·V[p, :]

The order p goes into constants alone, one for each class of axes that must share it
(channel_classes.py): the residual stream, the hidden layer of each feed-forward block, queries and
keys, values. Within heads each has its own order, where statistics tell heads apart; heads
themselves stay where they are. An output of the graph gets its order back by one Gather in front of
it.

Widest first, by the largest magnitude that any tensor of the class had on each channel: the
range-based permutation of Bondarenko et al. 2021, "Understanding and Overcoming the Challenges of
Efficient Transformer Quantization", section 4. Groups of neighbouring channels can then share a
scale without the wide ones spoiling it for the narrow. Refuses a class where some operator reads
or writes single channels, and one of which nothing was seen.

Activations keep their names although their contents move: plan, ranges and statistics refer to
them by name, and follow. What is visible outside keeps its contents too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

from qcompile.ir import Graph, Tensor, array, rank
from qcompile.ir.analysis.channel_classes import ChannelClass, Member, channel_classes
from qcompile.planning import Context
from qcompile.quant import Array, Range
from qcompile.rewriting import Numerics, Pass, Stage

# Tensor -> axis, counted from the back -> the order of its entries.
Orders: TypeAlias = dict[str, dict[int, Array]]


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Sort channels by width, within heads."""

    name: ClassVar[str] = "permute-channels"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        """Quantized tensors of the classes that may change; those that tell heads apart first."""
        planned = {d.tensor for d in ctx.plan.quantized("activation")}
        for found in channel_classes(graph, ctx.evaluate):
            members = [m for m in found.activations if m.axis == -1 and m.tensor in planned]
            apart = [m for m in members if len(m.heads) == len(found.heads)]
            if not found.pinned:
                yield from (m.tensor for m in apart or members)

    def run(self, graph: Graph, ctx: Context) -> bool:
        chosen = []
        tensors = graph.tensors()
        for found in channel_classes(graph, ctx.evaluate):
            known = _as_told_apart(ctx, found, tensors)
            widths = _widths(ctx, known)
            order = None if widths is None else np.argsort(-widths, axis=-1, kind="stable")
            if order is not None and (order == np.arange(found.size)).all():
                continue  # sorted as it is: nothing to do, and nothing to refuse
            reason = found.pinned or ("no statistics of its channels" if order is None else "")
            if reason or order is None:
                ctx.skip(found.name, reason)
            else:
                chosen.append((known, order))
        permute(graph, ctx, chosen)
        return bool(chosen)


def permute(graph: Graph, ctx: Context, chosen: Sequence[tuple[ChannelClass, Array]]) -> None:
    """Put classes into the given orders, (*heads, channels) each; statistics and plan follow."""
    tensors = graph.tensors()
    for name, axes in _orders(chosen, "constants").items():
        values = array(tensors[name])
        for axis, order in axes.items():
            values = np.take(values, order, axis)
        new = graph.constant(f"{name}/permuted", values)
        graph.replace_uses(tensors[name], new)
        ctx.plan.rename(name, new.name)
    moved = _orders(chosen, "activations")
    for name, axes in _orders(chosen, "outputs").items():
        inner = _restore(graph, tensors[name], axes)
        ctx.rename(name, inner.name)
        moved[inner.name] = moved.pop(name)
        tensors[inner.name] = inner
    _follow(ctx, moved, tensors)


def _orders(chosen: Sequence[tuple[ChannelClass, Array]], part: str) -> Orders:
    """What happens to each axis of these members; two classes may lie on one.

    Where a head is on another axis there is no one order: nothing is known of such activations.
    """
    found: Orders = {}
    for item, order in chosen:
        members: tuple[Member, ...] = getattr(item, part)
        for member in (m for m in members if len(m.heads) == len(item.heads)):
            axes = found.setdefault(member.tensor, {})
            whole = member.spread(order)
            axes[member.axis] = axes[member.axis][whole] if member.axis in axes else whole
    return found


# ---- which order


def _as_told_apart(
    ctx: Context, found: ChannelClass, tensors: Mapping[str, Tensor]
) -> ChannelClass:
    """The class, with one order for all heads where what is known of it has no heads.

    Statistics of [batch, heads, tokens, channels] are by channel alone: an order for each head
    would leave them untrue.
    """
    known = [m for m in found.activations if _is_known(ctx, m, tensors)]
    return found if all(m.heads for m in known) else found.alike()


def _is_known(ctx: Context, member: Member, tensors: Mapping[str, Tensor]) -> bool:
    """True where there are statistics or ranges by entry of this axis."""
    span = ctx.ranges.get(member.tensor)
    ranged = span is not None and _from_back(tensors[member.tensor], span) == member.axis
    return ranged or (member.axis == -1 and member.tensor in ctx.channels)


def _from_back(tensor: Tensor, span: Range) -> int | None:
    """The axis of a range, counted from the back."""
    axis, dims = span.axis, rank(tensor)
    return axis - dims if axis is not None and axis >= 0 and dims is not None else axis


def _widths(ctx: Context, found: ChannelClass) -> Array | None:
    """The largest magnitude of each channel, (*heads, channels); None where nothing was seen."""
    seen = [
        m.largest(ctx.channels[m.tensor].width)
        for m in found.activations
        if m.axis == -1 and m.tensor in ctx.channels
    ]
    return np.maximum.reduce(seen) if seen else None


# ---- what follows


def _restore(graph: Graph, output: Tensor, axes: Mapping[int, Array]) -> Tensor:
    """Give a graph output its order back; returns the permuted tensor that its readers now read."""
    maker = graph.producer(output)
    assert maker is not None  # classes of other outputs are pinned
    graph.renew_output(maker, "permuted", output.dtype)
    inner = made = maker.outputs[0]
    for i, (axis, order) in enumerate(axes.items(), 1):
        back = graph.constant(f"{output.name}/order", np.argsort(order))
        result = output if i == len(axes) else f"{output.name}/restored"
        made = graph.add("Gather", [made, back], [result], {"axis": axis}, like=output).outputs[0]
    return inner


def _follow(ctx: Context, moved: Orders, tensors: Mapping[str, Tensor]) -> None:
    for name, axes in moved.items():
        if name in ctx.channels and -1 in axes:
            ctx.channels[name] = ctx.channels[name].permuted(axes[-1])
        span = ctx.ranges.get(name)
        axis = None if span is None else _from_back(tensors[name], span)
        if span is not None and axis in axes:
            order = axes[axis]
            ctx.ranges.set(name, Range(span.lo[order], span.hi[order], span.axis))
