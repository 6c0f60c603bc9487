"""Which positions of each tensor the graph's outputs depend on, by backward analysis.

A classifier reads position 0 of the last layer. Then its norms, feed-forward network, residual sum,
attention output, probabilities and queries are needed at that position only, but keys and values at
all: ``rules`` knows which operand is which. A tensor is needed at some positions if all its readers
need the same; graph outputs, subgraphs and operators that combine positions need all.

Where the selection ends, at tensors that others need whole, it is computed: ``Narrowing.entries``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_op, op_name
from qcompile.ir.analysis.positions.reshaping import split_shape, target_of
from qcompile.ir.analysis.positions.rules import WHOLE, Axis, mapped
from qcompile.ir.analysis.positions.selections import Demand, Root, root_of, selected_axis
from qcompile.ir.analysis.positions.sizes import Sizes
from qcompile.ir.operators import MATMULS, QKV_ATTENTION

_COSTLY = (*MATMULS, *QKV_ATTENTION, "Gemm")


@dataclass
class Narrowing:
    """Nodes that need to compute the selected positions only, connected with each other.

    roots: the nodes that selected them so far. nodes: with what is needed of their results.
    entries: (node, input, demand) where a node reads selected positions of a tensor that is
    computed whole.
    """

    roots: list[Root] = field(default_factory=list)
    nodes: list[tuple[Node, Demand]] = field(default_factory=list)
    entries: list[tuple[Node, int, Demand]] = field(default_factory=list)

    @property
    def multiplications(self) -> int:
        """Number of matrix multiplications among the nodes."""
        return sum(is_op(node, *_COSTLY) for node, _ in self.nodes)


@dataclass
class Found:
    """narrowings: those worth their Gather. refusals: (node where a selection ends, reason)."""

    narrowings: list[Narrowing] = field(default_factory=list)
    refusals: list[tuple[Node, Refusal]] = field(default_factory=list)


def may_select(graph: Graph, node: Node) -> bool:
    """True for a node that selects along an axis of a computed tensor that others need not whole.

    Cheap: before sizes are known.
    """
    if selected_axis(node) is None or graph.producer(node.inputs[0]) is None:
        return False
    return whole_reader(graph, node) is None


def whole_reader(graph: Graph, root: Node) -> Refusal | None:
    """Who certainly needs all of what a node selects from; None where nobody may."""
    tensor = root.inputs[0]
    if graph.is_output_of_graph(tensor):
        return Refusal(f"output {tensor.name!r} has all positions (--outputs NAME keeps others)")
    if graph.is_output(tensor):
        return Refusal(f"a subgraph reads {tensor.name!r}")
    for reader in graph.consumers(tensor):
        if selected_axis(reader) is None and not is_op(reader, "Shape"):
            return Refusal(f"{op_name(reader)} {reader.name!r} reads all of {tensor.name!r}")
    return None


def find_used_positions(sizes: Sizes) -> Found:
    """Every connected group of nodes that contains a matrix multiplication."""
    blocked: dict[int, Refusal] = {}
    while True:
        analysis = _Analysis(sizes, blocked)
        analysis.run()
        late = dict(analysis.late_refusals())
        if not late:
            return analysis.found()
        blocked |= late


class _Analysis:
    """One pass over the nodes from the last to the first.

    ``blocked``: nodes that must compute all positions, by id.
    """

    def __init__(self, sizes: Sizes, blocked: dict[int, Refusal]) -> None:
        self.sizes, self.graph, self.blocked = sizes, sizes.graph, blocked
        self.wanted: dict[str, Demand | None] = {}  # None: whole
        self.needs: dict[int, list[Demand | None]] = {}  # of a narrowed node's operands
        self.results: dict[int, tuple[Node, Demand]] = {}  # what is wanted of its results
        self.roots: dict[int, Root] = {}
        self.refused: dict[int, Refusal] = {}  # why nodes compute all positions

    def run(self) -> None:
        """Fill in what is wanted of every tensor."""
        for name, tensor in self.graph.tensors().items():
            if self.graph.is_output(tensor):
                self.wanted[name] = WHOLE
        for node in reversed(self.graph.nodes):
            self._visit(node)

    def _visit(self, node: Node) -> None:
        demand = self._of_results(node)
        needs = self._passed(node, demand) if demand is not None else None
        if demand is not None and isinstance(needs, list):
            self.needs[id(node)], self.results[id(node)] = needs, (node, demand)
        else:
            needs = self._selected(node)
        for tensor, need in zip(node.inputs, needs, strict=True):
            if not is_op(node, "Shape"):  # it is patched where its operand is narrowed
                self._want(tensor, need)

    def _of_results(self, node: Node) -> Demand | None:
        """The one demand on all results in use."""
        demands = [self.wanted[t.name] for t in node.outputs if t.name in self.wanted]
        first = demands[0] if demands else None
        return first if all(d == first for d in demands) else None

    def _want(self, tensor: Tensor, need: Demand | None) -> None:
        if tensor.name and self.wanted.setdefault(tensor.name, need) != need:
            self.wanted[tensor.name] = WHOLE

    def _selected(self, node: Node) -> list[Demand | None]:
        """What a node that computes all its results needs: of a selecting node, some positions."""
        needs: list[Demand | None] = [WHOLE] * len(node.inputs)
        root = root_of(self.sizes, node)
        if isinstance(root, Root):
            self.roots[id(node)] = root
            needs[0] = root.demand
        elif isinstance(root, Refusal):
            self.refused.setdefault(id(node), root)
        return needs

    def _passed(self, node: Node, demand: Demand) -> list[Demand | None] | Refusal:
        """What a node needs of its operands for some positions of its results."""
        refusal = self.blocked.get(id(node)) or self._obstacle(node, demand)
        needs = refusal or self._mapped(node, demand)
        if isinstance(needs, Refusal):
            self.refused[id(node)] = needs.about(f"{op_name(node)} computes all positions")
        return needs

    def _obstacle(self, node: Node, demand: Demand) -> Refusal | None:
        for tensor in node.outputs:
            shapes = any(is_op(n, "Shape") for n in self.graph.consumers(tensor))
            if shapes and not self._has_shape_from_inputs(tensor, demand):
                return Refusal(f"the shape of {tensor.name!r} is read, and no input has its sizes")
        if is_op(node, "Reshape"):
            target = target_of(self.sizes, node, demand)
            return target if isinstance(target, Refusal) else None
        return None

    def _has_shape_from_inputs(self, tensor: Tensor, demand: Demand) -> bool:
        """True where inputs have the number of positions, and all other sizes of a tensor if they
        may decide which positions are selected: these cannot depend on what is selected."""
        if demand.axis.merged:
            return False
        others = self.sizes.of(tensor) or () if demand.selection.source else ()
        return all(self.sizes.source(n) is not None for n in (demand.axis.size, *others))

    def _mapped(self, node: Node, demand: Demand) -> list[Demand | None] | Refusal:
        axes = mapped(self.sizes, node, demand.axis)
        samples = mapped(self.sizes, node, demand.batch) if demand.batch is not None else None
        for found in (axes, samples):
            if isinstance(found, Refusal):
                return found
        assert isinstance(axes, list)
        needs: list[Demand | None] = []
        for i, axis in enumerate(axes):
            if axis is WHOLE or axis.spread:
                needs.append(WHOLE)
                continue
            batch = samples[i] if isinstance(samples, list) else None
            if demand.batch is not None and batch is None:
                return Refusal("its operands have positions and samples separately")
            needs.append(Demand(axis, demand.selection, batch))
        return needs + [WHOLE] * (len(node.inputs) - len(needs))

    # ---- after the pass

    def is_narrowed(self, tensor: Tensor) -> bool:
        """True where the maker of a tensor computes the selected positions only."""
        node = self.graph.producer(tensor)
        return node is not None and id(node) in self.needs

    def late_refusals(self) -> Iterator[tuple[int, Refusal]]:
        """Nodes that cannot be narrowed, since an operand's positions cannot be selected."""
        for node, i, demand in self._entries(n for n, _ in self.results.values()):
            axes = [demand.axis, *([] if demand.batch is None else [demand.batch])]
            why = _entry_obstacle(self.sizes, node.inputs[i], axes)
            if why is not None:
                yield id(node), why

    def _entries(self, nodes: Iterable[Node]) -> Iterator[tuple[Node, int, Demand]]:
        for node in nodes:
            for i, need in enumerate(self.needs[id(node)]):
                if need is not None and not self.is_narrowed(node.inputs[i]):
                    yield node, i, need

    def found(self) -> Found:
        """Groups with a matrix multiplication, and why other selections save nothing."""
        found = Found()
        for roots, members in self._groups():
            group = Narrowing(roots, [self.results[id(n)] for n in members])
            group.entries = [*self._entries(members)]
            if group.multiplications:
                found.narrowings.append(group)
            found.refusals += self._stops(roots, members)
        found.refusals += [(n, self.refused[id(n)]) for n in self.graph.nodes if self._is_root(n)]
        return found

    def _is_root(self, node: Node) -> bool:
        return id(node) in self.refused and selected_axis(node) is not None

    def _stops(
        self, roots: Sequence[Root], members: Sequence[Node]
    ) -> Iterator[tuple[Node, Refusal]]:
        """Nodes at which a selection ends, since they have to compute all positions."""
        tops = [*(r.node.inputs[0] for r in roots), *(t for n in members for t in n.inputs)]
        for node in {id(n): n for t in tops if (n := self.graph.producer(t))}.values():
            if id(node) in self.refused and selected_axis(node) is None:
                yield node, self.refused[id(node)]

    def _groups(self) -> Iterator[tuple[list[Root], list[Node]]]:
        """Narrowed nodes connected by narrowed tensors, with their selecting nodes."""
        seen: set[int] = set()
        for root in self.roots.values():
            if id(root.node) in seen:
                continue
            roots, members, waiting = [], [], [root.node]
            while waiting:
                node = waiting.pop()
                if id(node) in seen:
                    continue
                seen.add(id(node))
                if id(node) in self.roots:
                    roots.append(self.roots[id(node)])
                else:
                    members.append(node)
                waiting += self._neighbours(node)
            yield roots, members

    def _neighbours(self, node: Node) -> Iterator[Node]:
        """Nodes that make or read a narrowed tensor that a node reads or makes."""
        is_root = id(node) in self.roots
        needs = [self.roots[id(node)].demand] if is_root else self.needs[id(node)]
        for tensor, need in zip(node.inputs, needs, strict=False):
            if need is not None and self.is_narrowed(tensor):
                yield self.graph.producer(tensor)
        for tensor in () if is_root else node.outputs:
            for reader in self.graph.consumers(tensor):
                if id(reader) in self.needs or id(reader) in self.roots:
                    yield reader


def _entry_obstacle(sizes: Sizes, tensor: Tensor, axes: Sequence[Axis]) -> Refusal | None:
    """Why the selected positions of a tensor cannot be taken from it."""
    axis, *batch = axes
    if any(b.merged for b in batch) or (batch and axis.merged):
        return Refusal(f"samples and positions of {tensor.name!r} are one axis")
    if axis.merged:
        shape = split_shape(sizes, tensor, axis)
        return shape if isinstance(shape, Refusal) else None
    if is_constant(tensor) and array(tensor).dtype.kind not in "biuf":
        return Refusal(f"{tensor.name!r} has a type that cannot be selected from")
    return None
