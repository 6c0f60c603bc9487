"""Computes only the positions that the outputs depend on.

    x → LayerNorm, linears, attention → y[B,S,H] → Gather(y, 0)
        →   x, and Gather(x, [0]) for queries and residual → the same on [B,1,H] → Gather(y, 0)

In the last layer of a classifier, all but keys and values is needed at one position. The selection
moves up, to every tensor that others need whole: masks and position biases of shape [S, S] are
selected too. Which positions an operator needs of its operands is in ``ir/analysis/positions``;
nodes keep their names and those of their results, whose values are those of the selected positions.

Refuses where an output, a subgraph or an operator that combines positions needs them all, where
sizes do not show which axis has the positions, and where nothing but elementwise operators would be
saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_op, rank
from qcompile.ir.analysis.data_path import data_path
from qcompile.ir.analysis.positions.reshaping import ReplacedEntry, split_shape, target_of
from qcompile.ir.analysis.positions.selections import Demand, Selection, selected_axis
from qcompile.ir.analysis.positions.sizes import Size, Sizes, fixed, sizes_of
from qcompile.ir.analysis.positions.used_positions import (
    Narrowing,
    find_used_positions,
    may_select,
    whole_reader,
)
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_SINCE = 13  # operands of Squeeze, GatherND's batch_dims
NOTE = "unused-positions"


@dataclass(frozen=True)
class DropUnusedPositions(Pass):
    """Compute the positions that are used, no others."""

    name: ClassVar[str] = "drop-unused-positions"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, graph: Graph, ctx: Context) -> bool:
        selecting = [n for n in graph.nodes if selected_axis(n) is not None]
        _report_whole(graph, ctx, selecting)
        if not any(may_select(graph, n) for n in selecting):
            return False
        if graph.opset < _SINCE:
            ctx.skip(graph.name, f"opset {graph.opset}, needs {_SINCE}")
            return False
        for sizes in sizes_of(graph, ctx.evaluate):
            found = find_used_positions(sizes)
            if found.narrowings:
                break
        for node, refusal in found.refusals:
            ctx.skip(node, refusal.reason)
        if found.narrowings:
            ctx.remarks[NOTE] = "; ".join(map(_summary, found.narrowings))
        for narrowing in found.narrowings:
            _Editor(sizes).apply(narrowing)
        return bool(graph.remove_dead()) or bool(found.narrowings)


def _report_whole(graph: Graph, ctx: Context, selecting: Sequence[Node]) -> None:
    """Say who needs all positions; parts of channels, as rotary embeddings take, are none."""
    path = data_path(graph) if selecting else set()
    for node in selecting:
        data, axis = node.inputs[0], selected_axis(node)
        refusal = whole_reader(graph, node)
        if refusal is not None and data.name in path and axis not in (-1, (rank(data) or 0) - 1):
            ctx.skip(node, refusal.reason)


def _summary(narrowing: Narrowing) -> str:
    demand = narrowing.roots[0].demand
    names = ", ".join(repr(r.node.outputs[0].name) for r in narrowing.roots[:3])
    whole = fixed(demand.axis.size)
    many = "all" if whole is None else str(whole)
    return (
        f"the outputs depend on {demand.selection.count} of {many} positions through {names}: "
        f"{narrowing.multiplications} matrix multiplications run for no others"
    )


@dataclass
class _Editor:
    """Applies what the analysis found. Shapes and names are those before any edit."""

    sizes: Sizes
    taken: dict[tuple[str, Demand], Tensor] = field(default_factory=dict)
    indices: dict[Selection, Tensor] = field(default_factory=dict)
    lengths: dict[Size, Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.sizes.graph

    def apply(self, narrowing: Narrowing) -> None:
        """Let the nodes of a group compute the selected positions."""
        targets = [
            (node, target_of(self.sizes, node, demand))
            for node, demand in narrowing.nodes
            if is_op(node, "Reshape")
        ]
        for node, demand in narrowing.nodes:
            for tensor in node.outputs:
                self._keep_shape(tensor, demand)
        for node, i, demand in narrowing.entries:
            self.graph.set_input(node, i, self._take(node.inputs[i], demand))
        for node, target in targets:
            self._set_target(node, target)
        for node, demand in narrowing.nodes:
            _set_shapes(node, demand)
        for root in narrowing.roots:
            root.select_all(self.graph)

    # ---- shapes

    def _keep_shape(self, tensor: Tensor, demand: Demand) -> None:
        """Let readers of a tensor's shape read that of all positions.

        If a tensor holds the positions, it may be computed from this shape: then no size is read
        from the narrowed tensor.
        """
        graph, index = self.graph, demand.axis.index
        for shape in [n for n in graph.consumers(tensor) if is_op(n, "Shape")]:
            dims = range(rank(tensor) or len(self.sizes.of(tensor) or ()))
            chosen = dims[shape.attrs.get("start", 0) : shape.attrs.get("end", len(dims))]
            if index not in chosen:
                continue
            result, own = shape.outputs[0], graph.divert_output(shape, "used")
            own.dtype = np.dtype(np.int64)
            sizes = dict(enumerate(self.sizes.of(tensor) or ())) if demand.selection.source else {}
            sizes[index] = demand.axis.size
            parts = [
                self._length(sizes[i]) if i in sizes else self._entry(own, i - chosen[0])
                for i in chosen
            ]
            graph.add("Concat", parts, [result], {"axis": 0})

    def _entry(self, shape: Tensor, index: int) -> Tensor:
        place = self.graph.constant("positions/entry", np.array([index], np.int64))
        return self._int64("Gather", [shape, place], f"{shape.name}/{index}", {"axis": 0})

    def _length(self, size: Size) -> Tensor:
        """A size, such as the number of all positions, int64 (1,)."""
        if size not in self.lengths:
            source = self.sizes.source(size)
            if isinstance(source, tuple):
                tensor, axis = source
                shape = self._int64("Shape", [tensor], f"{tensor.name}/shape")
                self.lengths[size] = self._entry(shape, axis)
            else:
                self.lengths[size] = self.graph.constant(
                    "positions/length", np.array([source], np.int64)
                )
        return self.lengths[size]

    def _set_target(self, node: Node, target: list[int] | ReplacedEntry | Refusal) -> None:
        graph, old = self.graph, node.inputs[1]
        if isinstance(target, list):
            if target != array(old).tolist():
                graph.set_constant(node, 1, np.array(target, np.int64), f"{old.name}/used")
        elif isinstance(target, ReplacedEntry):
            made = len(node.outputs[0].shape or self.sizes.of(node.outputs[0]) or ())
            entry = graph.constant("positions/count", np.array([target.value], np.int64))
            parts = [entry if i == target.index else self._entry(old, i) for i in range(made)]
            graph.set_input(node, 1, self._int64("Concat", parts, f"{old.name}/used", {"axis": 0}))

    def _int64(
        self, op: str, inputs: list[Tensor], name: str, attrs: dict[str, int] | None = None
    ) -> Tensor:
        result: Tensor = self.graph.add(op, inputs, [name], attrs).outputs[0]
        result.dtype = np.dtype(np.int64)
        return result

    # ---- selected positions of a tensor that is computed whole

    def _take(self, tensor: Tensor, demand: Demand) -> Tensor:
        key = tensor.name, demand
        if key not in self.taken:
            self.taken[key] = self._selected(tensor, demand)
        return self.taken[key]

    def _selected(self, tensor: Tensor, demand: Demand) -> Tensor:
        axis, batch, chosen = demand.axis, demand.batch, demand.selection
        if is_constant(tensor) and chosen.indices and not axis.merged:
            values = np.take(array(tensor), chosen.indices, axis.index)
            return self.graph.constant(f"{tensor.name}/used", values)
        if axis.merged:
            return self._from_merged(tensor, demand)
        if batch is None:
            return self._gather(tensor, axis.index, chosen)
        if batch.spread:
            return self._for_each_sample(tensor, axis.index, batch.index, chosen)
        return self._of_each_sample(tensor, axis.index, batch.index, chosen)

    def _gather(self, tensor: Tensor, axis: int, chosen: Selection) -> Tensor:
        return self._add("Gather", [tensor, self._indices(chosen)], tensor, "used", {"axis": axis})

    def _indices(self, chosen: Selection) -> Tensor:
        """The positions, int64 [count]; of a selection for each sample, [batch]."""
        if chosen not in self.indices:
            if chosen.source:
                source = self.graph.tensors()[chosen.source]
                whole = self._int64("Cast", [source], f"{source.name}/int64", {"to": 7})
                flat = self.graph.constant("positions/flat", np.array([-1], np.int64))
                made = self._int64("Reshape", [whole, flat], f"{source.name}/flat")
            else:
                made = self.graph.constant("positions/used", np.array(chosen.indices, np.int64))
            self.indices[chosen] = made
        return self.indices[chosen]

    def _from_merged(self, tensor: Tensor, demand: Demand) -> Tensor:
        """Positions from [batch * sequence, channels]: through [batch, sequence, 1, channels]."""
        axis, chosen = demand.axis, demand.selection
        shape = split_shape(self.sizes, tensor, axis)
        assert isinstance(shape, list)
        parts: list[Tensor] = []
        for size in shape:
            length = self._length(axis.size) if size is None else None
            known = np.array([size], np.int64) if size is not None else None
            parts.append(length if known is None else self.graph.constant("positions/size", known))
        split = self._int64("Concat", parts, f"{tensor.name}/split_shape", {"axis": 0})
        split = self._add("Reshape", [tensor, split], tensor, "split")
        used = self._gather(split, axis.index + 1, chosen)
        rest = [size if size is not None else 0 for size in shape[axis.index + 3 :]]
        around = [shape[axis.index] or 0, shape[axis.index + 2] or 0]
        joined = -1 if -1 in around else around[0] * around[1] * chosen.count
        target = np.array([*([0] * axis.index), joined, *rest], np.int64)
        whole = self.graph.constant(f"{tensor.name}/merged_shape", target)
        return self._add("Reshape", [used, whole], tensor, "used")

    def _of_each_sample(self, tensor: Tensor, axis: int, batch: int, chosen: Selection) -> Tensor:
        """One position of each sample, by GatherND from [batch, positions, …]."""
        rest = [i for i in range(self._rank(tensor)) if i not in (batch, axis)]
        order = [batch, axis, *rest]
        ahead = self._transposed(tensor, order)
        column = self.graph.constant("positions/column", np.array([-1, 1, 1], np.int64))
        places = self._int64("Reshape", [self._indices(chosen), column], f"{tensor.name}/places")
        used = self._add("GatherND", [ahead, places], tensor, "used", {"batch_dims": 1})
        return self._transposed(used, [int(i) for i in np.argsort(order)])

    def _for_each_sample(self, tensor: Tensor, axis: int, batch: int, chosen: Selection) -> Tensor:
        """One position for each sample, from a tensor that has no samples, such as a causal mask
        [S, S]: becomes [batch, 1, 1, S] where the axis of samples is three before the positions."""
        wide = self._rank(tensor)
        if batch < 0:
            axes = self.graph.constant("positions/axes", np.arange(-batch, dtype=np.int64))
            tensor = self._add("Unsqueeze", [tensor, axes], tensor, "wide")
            axis, wide, batch = axis - batch, wide - batch, 0
        rows = self._gather(tensor, axis, chosen)
        order = list(range(wide))
        order[axis], order[batch] = batch, axis
        return self._transposed(rows, order)

    def _transposed(self, tensor: Tensor, order: list[int]) -> Tensor:
        if order == sorted(order):
            return tensor
        return self._add("Transpose", [tensor], tensor, "transposed", {"perm": order})

    def _rank(self, tensor: Tensor) -> int:
        return len(self.sizes.of(tensor) or ())

    def _add(
        self,
        op: str,
        inputs: list[Tensor],
        of: Tensor,
        suffix: str,
        attrs: dict[str, int] | dict[str, list[int]] | None = None,
    ) -> Tensor:
        result: Tensor = self.graph.add(op, inputs, [f"{of.name}/{suffix}"], attrs).outputs[0]
        result.dtype = of.dtype
        return result


def _set_shapes(node: Node, demand: Demand) -> None:
    """The declared shapes of results with the selected positions only."""
    axis, count = demand.axis, demand.selection.count
    for tensor in node.outputs:
        if tensor.shape is not None and axis.index < len(tensor.shape):
            shape = list(tensor.shape)
            shape[axis.index] = None if axis.merged else count
            tensor.shape = shape
