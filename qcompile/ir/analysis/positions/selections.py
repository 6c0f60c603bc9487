"""Nodes that select positions of a tensor, and which ones they select.

    Gather(x, 0), Gather(x, i), Slice(x, 0:1), Slice(x, -1:)   the same positions of every sample
    GatherND(x, (0,i[0]), (1,i[1]), …), Gather(rows of x, i[b] + b·S), GatherElements(x, Expand(i))
                                                               one position of each sample

The last line is how exporters write ``x[arange(batch), i]`` and ``x.gather(1, i)``: the last token
by the length of the text, or the token with the largest number (CLIP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_float, is_op
from qcompile.ir.analysis.positions.rules import Axis, simple_axis
from qcompile.ir.analysis.positions.sizes import Size, Sizes, fixed

SELECTORS = ("Gather", "GatherElements", "GatherND", "Slice")
_END = 2**31 - 1  # exporters write this and more for "to the end"
_VIEWS = ("Cast", "Reshape", "Squeeze", "Unsqueeze")
_NEVER_NEGATIVE = ("ArgMax", "ArgMin")


@dataclass(frozen=True)
class Selection:
    """``count`` positions: constant ``indices``, or those that the tensor ``source`` holds.

    each: one position of each sample, ``source`` has one index per sample; else the same positions
    of all samples.
    """

    count: int
    indices: tuple[int, ...] = ()
    source: str = ""
    each: bool = False


@dataclass(frozen=True)
class Demand:
    """Which positions of a tensor are needed. ``batch``: the axis of samples, for a selection that
    differs from sample to sample."""

    axis: Axis
    selection: Selection
    batch: Axis | None = None


@dataclass(frozen=True)
class Root:
    """A node that selects: what it needs of its first operand.

    select_all: rewrites the node once it reads the selected positions alone.
    """

    node: Node
    demand: Demand
    select_all: Callable[[Graph], None]


def selected_axis(node: Node) -> int | None:
    """The one axis along which a node selects of float data; None where it does not, or along
    several."""
    if not is_op(node, *SELECTORS) or is_constant(node.inputs[0]) or not is_float(node.inputs[0]):
        return None
    if is_op(node, "GatherND"):
        return 1
    if not is_op(node, "Slice"):
        return int(node.attrs.get("axis", 0))
    if len(node.inputs) < 4 or not all(is_constant(t) for t in node.inputs[1:] if t.name):
        return None
    axes = array(node.inputs[3])
    return int(axes.flat[0]) if axes.size == 1 else None


def root_of(sizes: Sizes, node: Node) -> Root | Refusal | None:
    """What a selecting node needs; None for other nodes, and where it selects most positions."""
    at, dims = selected_axis(node), sizes.of(node.inputs[0]) if node.inputs else None
    if at is None or dims is None or not -len(dims) <= at < len(dims):
        return None
    index = at % len(dims)
    size = dims[index]
    found: Root | Refusal | None
    if is_op(node, "GatherND", "GatherElements"):
        found = _one_of_each(sizes, node, index)
    elif is_op(node, "Slice"):
        found = _slice(node, index, size)
    else:
        found = _gather(sizes, node, index, size)
    if not isinstance(found, Root):
        return found
    whole = fixed(found.demand.axis.size)
    few = whole is None or 2 * found.demand.selection.count <= whole
    return found if few else None


def _gather(sizes: Sizes, node: Node, index: int, size: Size) -> Root | Refusal | None:
    places = node.inputs[1]
    if is_constant(places):
        values = array(places)
        chosen = Selection(values.size, _normal(values.ravel().tolist(), size))
        return Root(node, Demand(simple_axis(index, size), chosen), _read_in_order(node))
    dims = sizes.of(places)
    if dims is None or len(dims) > 1:
        return None
    if index == 0:
        rows = _rows_of_each(sizes, node)
        if rows is not None:
            return rows
    if dims and fixed(dims[0]) != 1:
        return None
    chosen = Selection(1, source=places.name)
    return Root(node, Demand(simple_axis(index, size), chosen), _read_in_order(node))


def _normal(places: list[int], size: Size) -> tuple[int, ...]:
    """Indices from the start, where the size is fixed."""
    whole = fixed(size)
    return tuple(p % whole if whole and -whole <= p < whole else p for p in places)


def _read_in_order(node: Node) -> Callable[[Graph], None]:
    def select_all(graph: Graph) -> None:
        places = node.inputs[1]
        shape = tuple(places.shape or ())
        if len(shape) == 1:
            graph.replace_uses(node.outputs[0], node.inputs[0])
            return
        dtype = array(places).dtype if is_constant(places) else np.dtype(np.int64)
        order = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=dtype).reshape(shape)
        graph.set_input(node, 1, graph.constant(f"{node.outputs[0].name}/position", order))

    return select_all


def _is_result(node: Node) -> Callable[[Graph], None]:
    def select_all(graph: Graph) -> None:
        graph.replace_uses(node.outputs[0], node.inputs[0])

    return select_all


def _without_axis(node: Node) -> Callable[[Graph], None]:
    def select_all(graph: Graph) -> None:
        axes = graph.constant(f"{node.outputs[0].name}/axis", np.array([1], np.int64))
        graph.substitute(node.outputs[0], "Squeeze", [node.inputs[0], axes], "squeezed")

    return select_all


def _slice(node: Node, index: int, size: Size) -> Root | Refusal | None:
    start, end = (int(array(t).flat[0]) for t in node.inputs[1:3])
    step = int(array(node.inputs[4]).flat[0]) if len(node.inputs) > 4 else 1
    whole = fixed(size)
    if whole is not None:
        places = tuple(range(*slice(start, end, step).indices(whole))) if step > 0 else ()
        if step < 0:  # the same numbers as numpy's, whose None for "to the start" ONNX writes -inf
            stop = end + whole if end < 0 else end
            places = tuple(range(min(start + whole if start < 0 else start, whole - 1),
                                 max(stop, -1), step))  # fmt: skip
    elif step == 1 and (start, end) == (0, 1):
        places = (0,)
    elif step == 1 and start == -1 and end >= _END:
        places = (-1,)
    elif step == 1 and start == 0 and end >= _END:
        return None
    else:
        return Refusal("how many positions it selects depends on the length")
    if not places:
        return None
    demand = Demand(simple_axis(index, size), Selection(len(places), places))
    return Root(node, demand, _is_result(node))


# ---- one position of each sample


def _one_of_each(sizes: Sizes, node: Node, index: int) -> Root | Refusal | None:
    data, places = node.inputs[:2]
    dims, shape = sizes.of(data) or (), sizes.of(places)
    expanded = sizes.graph.producer(places, "Expand") is not None
    if is_op(node, "GatherElements") and (index != 1 or not expanded):
        return None  # a lookup in a table, as of relative positions
    if shape is None or len(dims) < 2 or index != 1:
        return Refusal("the shape of its indices is unknown")
    one = (1,) * len(dims[0])
    if is_op(node, "GatherElements"):
        source = _expanded(sizes, places, dims) if len(shape) == len(dims) == 3 else None
        finish = _is_result(node)
    elif int(node.attrs.get("batch_dims", 0)) == 1:
        is_column = shape in ((dims[0], one), (dims[0], one, one))
        source = places.name if is_column else None
        finish = _is_result(node) if len(shape) == 3 else _without_axis(node)
    else:
        source, finish = _second_of_pairs(sizes, places, dims[0]), _without_axis(node)
    if source is None:
        return Refusal("its indices are not one position of each sample")
    return _of_each(sizes, node, dims, source, finish)


def _of_each(
    sizes: Sizes, node: Node, dims: tuple[Size, ...], source: str, finish: Callable[[Graph], None]
) -> Root:
    """One position of each sample; of a single sample, that of all samples."""
    batch, axis = simple_axis(0, dims[0]), simple_axis(1, dims[1])
    if fixed(dims[0]) == 1:
        return Root(node, Demand(axis, Selection(1, source=source)), finish)
    return Root(node, Demand(axis, Selection(1, source=source, each=True), batch), finish)


def _expanded(sizes: Sizes, places: Tensor, dims: tuple[Size, ...]) -> str | None:
    """The indices of [batch, 1, channels] that are equal in all channels, before their Expand."""
    expand = sizes.graph.producer(places, "Expand")
    shape = sizes.of(expand.inputs[0]) if expand is not None else None
    one = (1,) * len(dims[0])
    if (
        expand is None
        or shape != (dims[0], one, one)
        or sizes.of(places) != (dims[0], one, dims[2])
    ):
        return None
    return str(expand.inputs[0].name)


def _second_of_pairs(sizes: Sizes, places: Tensor, batch: Size) -> str | None:
    """i of the indices [batch, 2] with rows (b, i[b])."""
    two = (2,) * len(batch)
    join = sizes.graph.producer(places, "Concat")
    if sizes.of(places) != (batch, two) or join is None or len(join.inputs) != 2:
        return None
    samples, source = join.inputs
    ordered = _is_range(sizes, samples, batch, (1,) * len(batch))
    return str(source.name) if ordered else None


def _rows_of_each(sizes: Sizes, node: Node) -> Root | Refusal | None:
    """Gather of row i[b] + b·S of [batch · S, channels], in the order of the batch."""
    graph, (data, places) = sizes.graph, node.inputs
    flat = graph.producer(data, "Flatten", "Reshape")
    total = graph.producer(places, "Add")
    dims = sizes.of(flat.inputs[0]) if flat is not None else None
    rows, count = sizes.of(data), sizes.of(places)
    if total is None or dims is None or len(dims) < 3 or not rows or not count:
        return None
    batch, length = dims[:2]
    merged = tuple(b * s for b, s in zip(batch, length, strict=True))
    if rows[0] != merged or count[0] != batch:
        return None
    for source, offsets in (total.inputs, total.inputs[::-1]):
        if sizes.of(source) == (batch,) and _is_range(sizes, offsets, batch, length):
            if not _is_never_negative(graph, source):
                return Refusal("its indices may be negative: then it reads another sample's row")
            one = (1,) * len(batch)
            chosen = Selection(1, source=str(source.name), each=True)
            axis, samples = Axis(0, length, batch, one), Axis(0, batch, one, length)
            return Root(node, Demand(axis, chosen, samples), _is_result(node))
    return None


def _is_range(sizes: Sizes, tensor: Tensor, batch: Size, step: Size) -> bool:
    """True for the numbers 0, 1, … of all samples, times ``step``, in any layout."""
    graph = sizes.graph
    while (node := graph.producer(tensor, *_VIEWS)) is not None:
        tensor = node.inputs[0]
    whole, factor = fixed(batch), fixed(step)
    if is_constant(tensor):
        values = array(tensor).ravel()
        known = whole is not None and factor is not None and values.size == whole
        return known and bool((values == np.arange(whole or 0) * (factor or 0)).all())
    product = graph.producer(tensor, "Mul")
    if product is not None:
        return any(
            sizes.value(by) == step and _is_range(sizes, numbers, batch, (1,) * len(batch))
            for numbers, by in (product.inputs, product.inputs[::-1])
        )
    numbers = graph.producer(tensor, "Range")
    if numbers is None or step != (1,) * len(batch):
        return False
    expected = ((0,) * len(batch), batch, step)
    return all(sizes.value(t) == e for t, e in zip(numbers.inputs, expected, strict=True))


def _is_never_negative(graph: Graph, tensor: Tensor) -> bool:
    while (node := graph.producer(tensor, *_VIEWS)) is not None:
        tensor = node.inputs[0]
    return graph.producer(tensor, *_NEVER_NEGATIVE) is not None
