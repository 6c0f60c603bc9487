"""Sorts channels by their calibrated width, or so that the bound on pairs of weights costs less.

    y = LN(x·W + b)·V   →   y = LN(x·W[:, p] + b[p])·V[p, :]

Only constants are reordered, with one order p for each class of axes that must share it
(channel_classes.py): the residual stream, the hidden layer of each feed-forward block, queries and
keys, values. Each head has its own order where statistics are per head; the order of the heads does
not change. A Gather before each graph output restores its order.

By default widest first, by the largest magnitude that any tensor of the class had on each channel:
the range-based permutation of Bondarenko et al. 2021, "Understanding and Overcoming the Challenges
of Efficient Transformer Quantization", section 4. Groups of neighbouring channels can then share a
scale that fits all of them. Refuses a class where some operator reads or writes single channels,
and one without statistics.

With ``pairs``, so that large weights of one sign are seldom in one pair of rows, which would make
the scales of int8 weights coarser (quant/pair_order.py, docs/processors.md). This needs no
statistics. Refuses a class, of those that a weight with that bound reads, that several weights read
(each would need an order of its own), or with a graph output (which would need a Gather). Hidden
layers and values remain.

Activations keep their names although their channels move: plan, ranges and statistics refer to them
by name, and are updated. Graph outputs do not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

from qcompile.ir import Graph, Tensor, array, is_float, rank
from qcompile.ir.analysis.channel_classes import ChannelClass, Member, channel_classes
from qcompile.planning import Context, QuantizedLinear, linear_groups
from qcompile.quant import Array, Range, pair_order
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.system.threads import in_threads

# Classes, each with an order (*heads, channels).
Chosen: TypeAlias = list[tuple[ChannelClass, Array]]
# Tensor -> axis, counted from the back -> the order of its entries.
Orders: TypeAlias = dict[str, dict[int, Array]]


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Sort channels, within heads.

    pairs: not by width, but so that the bound on pairs of weights costs little.
    """

    name: ClassVar[str] = "permute-channels"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    pairs: bool = False

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        """Quantized tensors of the classes that may change: per head if any is, otherwise all."""
        if self.pairs:
            return
        planned = {d.tensor for d in ctx.plan.quantized("activation")}
        for cls in channel_classes(graph, ctx.evaluate):
            members = [m for m in cls.activations if m.axis == -1 and m.tensor in planned]
            per_head = [m for m in members if len(m.heads) == len(cls.heads)]
            if not cls.pinned:
                yield from (m.tensor for m in per_head or members)

    def run(self, graph: Graph, ctx: Context) -> bool:
        chosen = _by_pairs(graph, ctx) if self.pairs else _by_width(graph, ctx)
        permute(graph, ctx, chosen)
        return bool(chosen)


def permute(graph: Graph, ctx: Context, chosen: Sequence[tuple[ChannelClass, Array]]) -> None:
    """Permute the axes of classes by orders (*heads, channels); update statistics and plan."""
    tensors = graph.tensors()
    for name, axes in _orders(chosen, "constants").items():
        values = array(tensors[name])
        for axis, order in axes.items():
            values = np.take(values, order, axis)
        new = graph.constant(f"{name}/permuted", values)
        graph.replace_uses(tensors[name], new)
        ctx.plan.rename(name, new.name)
    orders = _orders(chosen, "activations")
    for name, axes in _orders(chosen, "outputs").items():
        inner = _restore(graph, tensors[name], axes)
        ctx.rename(name, inner.name)
        orders[inner.name] = orders.pop(name)
        tensors[inner.name] = inner
    _update_statistics(ctx, orders, tensors)


def _orders(chosen: Sequence[tuple[ChannelClass, Array]], part: str) -> Orders:
    """The order of each axis of the classes' members; two classes may share an axis.

    Members with heads on another axis are left out: their channels have several orders.
    """
    found: Orders = {}
    for item, order in chosen:
        members: tuple[Member, ...] = getattr(item, part)
        for member in (m for m in members if len(m.heads) == len(item.heads)):
            axes = found.setdefault(member.tensor, {})
            whole = member.spread(order)
            axes[member.axis] = axes[member.axis][whole] if member.axis in axes else whole
    return found


# ---- choosing the order by width


def _by_width(graph: Graph, ctx: Context) -> Chosen:
    """Widest channels first."""
    chosen: Chosen = []
    tensors = graph.tensors()
    for cls in channel_classes(graph, ctx.evaluate):
        sortable = _with_heads_of_statistics(ctx, cls, tensors)
        widths = _widths(ctx, sortable)
        order = None if widths is None else np.argsort(-widths, axis=-1, kind="stable")
        if order is not None and (order == np.arange(cls.size)).all():
            continue  # sorted already: nothing to do, and nothing to refuse
        reason = cls.pinned or ("no statistics of its channels" if order is None else "")
        if reason or order is None:
            ctx.skip(cls.name, reason)
        else:
            chosen.append((sortable, order))
    return chosen


def _with_heads_of_statistics(
    ctx: Context, cls: ChannelClass, tensors: Mapping[str, Tensor]
) -> ChannelClass:
    """The class, with one order for all heads where its statistics are not per head.

    Statistics of [batch, heads, tokens, channels] are per channel only: with an order for each
    head, they could not be permuted.
    """
    measured = [m for m in cls.activations if _is_measured(ctx, m, tensors)]
    return cls if all(m.heads for m in measured) else cls.alike()


def _is_measured(ctx: Context, member: Member, tensors: Mapping[str, Tensor]) -> bool:
    """True where there are statistics or ranges for the entries of this axis."""
    span = ctx.ranges.get(member.tensor)
    ranged = span is not None and _from_back(tensors[member.tensor], span) == member.axis
    return ranged or (member.axis == -1 and member.tensor in ctx.channels)


def _from_back(tensor: Tensor, span: Range) -> int | None:
    """The axis of a range, counted from the back."""
    axis, dims = span.axis, rank(tensor)
    return axis - dims if axis is not None and axis >= 0 and dims is not None else axis


def _widths(ctx: Context, cls: ChannelClass) -> Array | None:
    """The largest magnitude of each channel, (*heads, channels); None without statistics."""
    widths = [
        m.largest(ctx.channels[m.tensor].width)
        for m in cls.activations
        if m.axis == -1 and m.tensor in ctx.channels
    ]
    return np.maximum.reduce(widths) if widths else None


# ---- choosing the order by pairs


def _by_pairs(graph: Graph, ctx: Context) -> Chosen:
    """Classes that a single weight with the bound on pairs reads, each in an order for that one."""
    bounded = {
        linear.weight.name: linear
        for group in linear_groups(graph, ctx)
        for linear in group.linears
        if linear.spec.paired
    }
    if not bounded:
        return []
    tensors, tasks = graph.tensors(), []
    for cls in channel_classes(graph, ctx.evaluate):
        sortable = _with_heads_of_statistics(ctx, cls, tensors)
        readers = [m for m in sortable.constants if _reads(bounded.get(m.tensor), m)]
        if not readers:
            continue
        reason = _no_pairs(sortable, readers) or _integers(sortable, tensors)
        if reason:
            ctx.skip(cls.name, reason)
        else:
            tasks.append((sortable, readers[0], bounded[readers[0].tensor]))
    orders = in_threads(lambda task: _pair_order(*task), tasks)
    found = zip(tasks, orders, strict=True)
    return [(cls, order) for (cls, *_), order in found if (order != np.arange(cls.size)).any()]


def _reads(linear: QuantizedLinear | None, member: Member) -> bool:
    """True where the axis is that of the inputs of a linear layer's weight."""
    return linear is not None and member.axis == (-1 if linear.transposed else -2)


def _no_pairs(cls: ChannelClass, readers: Sequence[Member]) -> str:
    """Why the class keeps its order; "" where it need not."""
    if cls.pinned:
        return cls.pinned
    if cls.reaches_output:
        return f"graph output {cls.outputs[0].tensor!r} would need a Gather"
    if len(readers) > 1:
        return f"{len(readers)} weights read it: the best order of each is another"
    sizes, place = readers[0].sizes, readers[0].place
    if math.prod(sizes[place + 1 :]) > 1:
        return "its channels are not adjacent in the weight that reads it"
    if cls.size % 2 and math.prod(sizes) > cls.size:
        return f"its blocks have {cls.size} channels: pairs are in two blocks"
    return ""


def _integers(cls: ChannelClass, tensors: Mapping[str, Tensor]) -> str:
    """Which constant of the class came quantized; "" where none did."""
    names = (m.tensor for m in cls.constants if not is_float(tensors[m.tensor]))
    found = next(names, None)
    return f"{found!r} is already quantized in the input model" if found else ""


def _pair_order(cls: ChannelClass, reader: Member, linear: QuantizedLinear) -> Array:
    """The order for a class that one weight reads, (*heads, channels)."""
    weight = array(linear.weight).astype(np.float32)
    inputs_first = weight.T if linear.transposed else weight
    order: Array = pair_order(inputs_first[reader.positions()])
    return order.reshape(*cls.heads, cls.size)


# ---- updating outputs and statistics


def _restore(graph: Graph, output: Tensor, axes: Mapping[int, Array]) -> Tensor:
    """Restore the order of a graph output; returns the permuted tensor, which its readers read."""
    producer = graph.producer(output)
    assert producer is not None  # classes of other outputs are pinned
    graph.renew_output(producer, "permuted", output.dtype)
    inner = last = producer.outputs[0]
    for i, (axis, order) in enumerate(axes.items(), 1):
        inverse = graph.constant(f"{output.name}/order", np.argsort(order, kind="stable"))
        result = output if i == len(axes) else f"{output.name}/restored"
        gather = graph.add("Gather", [last, inverse], [result], {"axis": axis}, like=output)
        last = gather.outputs[0]
    return inner


def _update_statistics(ctx: Context, orders: Orders, tensors: Mapping[str, Tensor]) -> None:
    for name, axes in orders.items():
        if name in ctx.channels and -1 in axes:
            ctx.channels[name] = ctx.channels[name].permuted(axes[-1])
        span = ctx.ranges.get(name)
        axis = None if span is None else _from_back(tensors[name], span)
        if span is not None and axis in axes:
            order = axes[axis]
            ctx.ranges.set(name, Range(span.lo[order], span.hi[order], span.axis))
