"""Which axes must share one order of channels, and what prevents a change of that order.

A linear's output, what is added to it, the normalization after it and the rows of the weights that
read it are one class: if all are permuted alike, the model computes the same. Edits nothing.

Classes are found by propagating axes through all operators (axis_propagation.py), as products of
factors (axis_factors.py). Of an axis of 12 heads by 32 channels, the 32 are a class, and each head
may have its own order, as long as every tensor with these channels also has the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcompile.ir import (
    MICROSOFT,
    Graph,
    Node,
    Refusal,
    Tensor,
    has_subgraph,
    is_constant,
    is_op,
    op_name,
)
from qcompile.ir.analysis.axis_factors import Axis, Factor, leaves, pin
from qcompile.ir.analysis.axis_propagation import RULES, Axes, Flow, Result, reason
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.analysis.shape_probing import probed_shapes
from qcompile.ir.graph import reads
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import skeleton
from qcompile.ir.operators import ELEMENTWISE
from qcompile.quant import Array


@dataclass(frozen=True)
class Member:
    """One axis of one tensor; ``axis`` is counted from the back.

    ``sizes``: the factors of the axis, major first. ``place``: index of the factor with the
    channels. ``heads``: indices of the factors with the class's heads, () where one is not on this
    axis.
    """

    tensor: str
    axis: int
    sizes: tuple[int, ...]
    place: int
    heads: tuple[int, ...] = ()

    def spread(self, order: Array) -> Array:
        """The permutation of the whole axis, (length,), for an ``order`` (*heads, channels)."""
        places = (*self.heads, self.place)
        sizes = [n if i in places else 1 for i, n in enumerate(self.sizes)]
        # Broadcast the order over the other factors, and apply it to the positions on the axis.
        index = order.transpose(np.argsort(places)).reshape(sizes)
        grid = np.arange(int(np.prod(self.sizes))).reshape(self.sizes)
        index = np.broadcast_to(index, grid.shape)
        spread: Array = np.take_along_axis(grid, index, self.place).reshape(-1)
        return spread

    def positions(self) -> Array:
        """Where each channel is on the axis: (heads, channels, repeats)."""
        rest = [i for i in range(len(self.sizes)) if i not in (*self.heads, self.place)]
        grid = np.arange(int(np.prod(self.sizes))).reshape(self.sizes)
        channels = self.sizes[self.place]
        heads = int(np.prod([self.sizes[i] for i in self.heads]))
        places: Array = grid.transpose(*self.heads, self.place, *rest)
        return places.reshape(heads, channels, -1)

    def largest(self, values: Array) -> Array:
        """For values along the axis, (length,): their maximum per channel, (*heads, channels)."""
        places = (*self.heads, self.place)
        rest = tuple(i for i in range(len(self.sizes)) if i not in places)
        kept = values.reshape(self.sizes).max(axis=rest)
        ordered: Array = kept.transpose(np.argsort(np.argsort(places)))
        return ordered


@dataclass(frozen=True)
class ChannelClass:
    """Axes that must share one order of ``size`` channels, in each block of ``heads``.

    ``pinned``: why that order must stay, None where it may change. ``outputs``: the activations
    that are graph outputs.
    """

    size: int
    heads: tuple[int, ...]
    constants: tuple[Member, ...]
    activations: tuple[Member, ...]
    outputs: tuple[Member, ...] = ()
    pinned: str | None = None

    @property
    def name(self) -> str:
        """The first tensor, for messages."""
        return (*self.activations, *self.constants)[0].tensor

    @property
    def reaches_output(self) -> bool:
        return bool(self.outputs)

    def alike(self) -> ChannelClass:
        """The same class with one order for all heads."""
        parts = (self.constants, self.activations, self.outputs)
        constants, activations, outputs = (
            tuple(replace(m, heads=()) for m in part) for part in parts
        )
        return replace(
            self, heads=(), constants=constants, activations=activations, outputs=outputs
        )


def channel_classes(graph: Graph, evaluate: Evaluator) -> list[ChannelClass]:
    """The classes of all channels that a linear or a table writes or reads.

    Indices over blocks of channels, such as heads, keep their order and are not classes.
    """
    flow = _followed(graph, evaluate)
    found = {name: [leaves(axis) for axis in axes] for name, axes in flow.axes.items()}
    _pin_outputs(graph, found)
    hidden = [[leaves(axis) for axis in axes] for axes in flow.hidden]
    tensors = graph.tensors()
    majors = {
        id(factor)
        for name, axes in found.items()
        if is_constant(tensors[name])
        for axis in axes
        for factor in axis[:-1]
        if factor is not axis[-1]
    }
    views = _Views(graph, tensors, found, hidden)
    classes = [views.channel_class(f) for f in _weighted(found) if id(f) not in majors]
    return [c for c in classes if c.constants]  # without constants there is nothing to permute


def _weighted(found: Mapping[str, Axes]) -> Iterator[Factor]:
    factors = {id(f): f for axes in found.values() for axis in axes for f in axis}
    return (f for f in factors.values() if f.weighted and f.fixed is not None)


# ---- following axes


def _followed(graph: Graph, evaluate: Evaluator) -> Flow:
    """The axes of all tensors of a graph."""
    flow = Flow(graph, probed_shapes(_in_standard_operators(graph), evaluate))
    for tensor in graph.inputs:
        axes = flow.fresh(tensor, f"graph input {tensor.name!r} has it")
        flow.axes |= {} if axes is None else {tensor.name: axes}
    tensors = graph.tensors()
    for node in graph.nodes:
        _follow(flow, node, tensors)
    return flow


def _in_standard_operators(graph: Graph) -> Graph:
    """A copy without weights, with contrib operators replaced, since inference knows none."""
    model = skeleton(graph)
    for node in model.graph.node:
        if node.domain == MICROSOFT and is_op(node, *ELEMENTWISE):
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    del model.graph.value_info[:]
    return from_proto(model)


def _follow(flow: Flow, node: Node, tensors: Mapping[str, Tensor]) -> None:
    result = _apply_rule(flow, node)
    if isinstance(result, Refusal):
        made = _pin_all(flow, node, reason(node, result.reason), tensors)
    else:
        made = {t.name: axes for t, axes in zip(node.outputs, result, strict=True) if t.name}
        if all(t.name in flow.fixed for t in node.inputs if t.name):
            flow.fixed |= made.keys()
    flow.axes |= made


def _apply_rule(flow: Flow, node: Node) -> Result:
    rule = None if has_subgraph(node) else RULES.get(op_name(node))
    given = [flow.of(t) for t in node.inputs]
    known = [axes for axes in given if axes is not None]
    if rule is None:
        return Refusal("may mix its entries")
    if len(known) < len(given):
        return Refusal("reads a tensor of unknown shape")
    return rule(flow, node, known)


def _pin_all(flow: Flow, node: Node, why: str, tensors: Mapping[str, Tensor]) -> dict[str, Axes]:
    """Pin all axes that a node reads, and give its outputs new, pinned axes."""
    for tensor in (tensors[name] for name in reads(node) if name in tensors):
        for axis in flow.of(tensor) or []:
            pin(axis, why)
    made = {t.name: flow.fresh(t, why) for t in node.outputs if t.name}
    return {name: axes for name, axes in made.items() if axes is not None}


def _pin_outputs(graph: Graph, found: Mapping[str, Axes]) -> None:
    """Pin graph outputs whose order cannot be restored by a Gather after their producer.

    A tensor that a subgraph reads is pinned by the node with the subgraph.
    """
    for tensor in graph.outputs:
        maker = graph.producer(tensor)
        first = maker is not None and maker.outputs[0] is tensor
        for axis in found.get(tensor.name, []):
            if not first:
                pin(axis, f"graph output {tensor.name!r} is not the first result of a node")
            elif any(f.fixed is None for f in axis):
                pin(axis, f"graph output {tensor.name!r} has it in an axis of varying size")


# ---- classes of what was found


@dataclass(frozen=True)
class _Views:
    """The axes of all tensors; ``hidden``: of intermediate results, which have no names."""

    graph: Graph
    tensors: Mapping[str, Tensor]
    found: Mapping[str, Axes]
    hidden: Sequence[Axes]

    def channel_class(self, factor: Factor) -> ChannelClass:
        heads = self._heads(factor)
        constants: list[Member] = []
        activations: list[Member] = []
        pinned = factor.pinned
        for name, axes in self.found.items():
            for i, axis in enumerate(axes):
                count = sum(f is factor for f in axis)
                if count > 1:
                    pinned = pinned or f"{name!r} has it twice in one axis"
                if count == 0 or any(f.fixed is None for f in axis):
                    continue
                part = constants if is_constant(self.tensors[name]) else activations
                part.append(_member(name, i - len(axes), axis, factor, heads))
        ends = {t.name for t in self.graph.outputs}
        outputs = tuple(m for m in activations if m.tensor in ends)
        sizes = tuple(f.size[0] for f in heads)
        return ChannelClass(
            factor.size[0], sizes, tuple(constants), tuple(activations), outputs, pinned
        )

    def _heads(self, factor: Factor) -> list[Factor]:
        """Factors that may each have their own order of channels.

        Every tensor with the channels must have such a factor exactly once. Constants and outputs
        must have it on the same axis, major to the channels, since one permutation of that axis is
        all that can be applied to them.
        """
        common: list[Factor] | None = None
        for axes in self._carriers(factor):
            flat = [f for axis in axes for f in axis]
            once = [f for f in flat if flat.count(f) == 1 and f is not factor]
            common = once if common is None else [f for f in common if f in once]
        return [f for f in common or [] if f.fixed is not None]

    def _carriers(self, factor: Factor) -> Iterator[Axes]:
        ends = {t.name for t in self.graph.outputs}
        for name, axes in self.found.items():
            for axis in axes:
                if factor in axis and (name in ends or is_constant(self.tensors[name])):
                    yield [axis[: axis.index(factor) + 1]]
        for axes in (*self.found.values(), *self.hidden):
            if any(factor in axis for axis in axes):
                yield axes


def _member(name: str, place: int, axis: Axis, factor: Factor, heads: Sequence[Factor]) -> Member:
    on_axis = tuple(axis.index(h) for h in heads if h in axis)
    return Member(
        name,
        place,
        tuple(f.size[0] for f in axis),
        axis.index(factor),
        on_axis if len(on_axis) == len(heads) else (),
    )
