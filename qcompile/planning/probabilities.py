"""Which tensors consist of rows that sum to 1, and how long these rows are.

Values of an even row of n are 1/n: the longer the row, the smaller they are, whatever the data. So
a range that was calibrated on short rows, or [0, 1], does not resolve long ones. Rows come from
Softmax, and from a division by the sum of what is divided; operators that move, mask, average or
scale them keep them as small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_op, shape_of
from qcompile.ir.analysis.data_path import data_path, layout_root
from qcompile.ir.operators import LAYOUT

OPEN = math.inf  # length of rows whose length the graph leaves open
# Their results have values of their operands, or are smaller.
_KEEPING = (
    *LAYOUT, "Cast", "Clip", "Concat", "Dropout", "Gather", "GatherElements", "Max", "Mean", "Min",
    "Pad", "ReduceMean", "Relu", "Where",
)  # fmt: skip


def probability_rows(graph: Graph) -> dict[str, float]:
    """Length of the rows by tensor name, ``OPEN`` where unknown; tensors without are left out."""
    path, found = data_path(graph), dict[str, float]()
    for node in graph.nodes:
        for tensor, length in _rows(graph, node, found, path):
            if length:
                found[tensor.name] = max(length, found.get(tensor.name, 0))
    return found


def _rows(
    graph: Graph, node: Node, known: Mapping[str, float], path: set[str]
) -> Iterator[tuple[Tensor, float]]:
    """Tensors that a node shows to have rows, with their lengths (0 for none)."""
    if is_op(node, "Softmax"):
        yield node.outputs[0], _length(node.outputs[0], [int(node.attrs.get("axis", -1))])
        return
    axes = _divides_by_own_sum(graph, node)
    if axes is not None:  # the sum needs the small values too
        dividend = node.inputs[0]
        length = _length(dividend, axes)
        yield layout_root(graph, dividend), length
        yield node.outputs[0], length
        return
    for made in node.outputs:
        yield made, _kept(node, known, path)


def _kept(node: Node, known: Mapping[str, float], path: set[str]) -> float:
    """Length of the rows that a node's results keep from its operands, 0 for none."""
    lengths = [known[t.name] for t in node.inputs if t.name in known]
    longest = max(lengths, default=0)
    others = [t for t in node.inputs if t.name in path and t.name not in known]
    if not lengths or is_op(node, *_KEEPING):
        return longest
    if is_op(node, "Add", "MatMul", "Sub", "Sum"):  # a MatMul of two: paths of two steps
        alone = not others and (len(lengths) > 1 or not is_op(node, "MatMul"))
        return longest if alone else 0
    if is_op(node, "Div"):
        return known.get(node.inputs[0].name, 0)
    if is_op(node, "Mul"):
        # Weighted data of a known length: it was calibrated at that length.
        return longest if not others or longest == OPEN else 0
    return 0


def _divides_by_own_sum(graph: Graph, node: Node) -> list[int] | None:
    """The axes of the sum in x / ReduceSum(x), None for any other node."""
    if not is_op(node, "Div"):
        return None
    dividend, divisor = (layout_root(graph, t) for t in node.inputs)
    total = graph.producer(divisor)
    while total is not None and is_op(total, "Add", "Clip", "Max"):  # which keep it above 0
        total = graph.producer(layout_root(graph, total.inputs[0]))
    if total is None or not is_op(total, "ReduceSum"):
        return None
    if layout_root(graph, total.inputs[0]) is not dividend:
        return None
    if len(total.inputs) < 2 or not is_constant(total.inputs[1]):
        return []
    return [int(i) for i in array(total.inputs[1]).flat]


def _length(tensor: Tensor, axes: list[int]) -> float:
    """Number of entries along these axes; ``OPEN`` where a size is unknown, or no axis is given."""
    shape = shape_of(tensor)
    sizes = [
        shape[i] if shape is not None and -len(shape) <= i < len(shape) else None for i in axes
    ]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if axes and len(known) == len(axes) else OPEN
