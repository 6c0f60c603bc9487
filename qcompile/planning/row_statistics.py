"""Which tensors only scale rows of data: what a normalization computes before it multiplies.

    x · 1/√(mean(x²) + ε):   x², its mean, the sum with ε, the root and its reciprocal

A LayerNormalization is one operator, whose inner tensors no plan sees. RMSNorm, L2 norms and group
norms arrive as several operators. Their inner tensors have one value for a whole row: rounding it
scales the row, and its inverse has no bound that calibration could find. Where a row is small, as
after attention that averages over a long text, its inverse is large.
"""

from __future__ import annotations

from qcompile.ir import Graph, Node, Tensor, is_constant, is_op, scalar
from qcompile.ir.analysis.data_path import data_path
from qcompile.ir.operators import ELEMENTWISE, LAYOUT, REDUCTIONS

_VALUE_BY_VALUE = (*ELEMENTWISE, *LAYOUT)


def row_statistics(graph: Graph) -> set[str]:
    """Names of the tensors that are computed by a reduction and end as the inverse factor of data,
    and of squares and magnitudes that only such reductions read.
    """
    path = data_path(graph)
    reduced, inverse = _reduced(graph, path)
    found: set[str] = set()
    for node in reversed(graph.nodes):
        for tensor in node.outputs:
            if tensor.name in reduced and _scales(graph, tensor, reduced, inverse, found, path):
                found.add(tensor.name)
    squares = (t for n in graph.nodes for t in n.outputs if _is_magnitude(n))
    return found | {t.name for t in squares if _only_reduced(graph, t, found)}


def _reduced(graph: Graph, path: set[str]) -> tuple[set[str], set[str]]:
    """Tensors that follow value by value from reductions alone; which of them are inverse."""
    reduced: set[str] = set()
    inverse: set[str] = set()
    for node in graph.nodes:
        data = [t for t in node.inputs if t.name in path]
        if not data or not all(t.name in path for t in node.outputs):
            continue
        names = [t.name for t in node.outputs]
        if is_op(node, *REDUCTIONS):
            reduced.update(names)
        elif is_op(node, *_VALUE_BY_VALUE) and all(t.name in reduced for t in data):
            reduced.update(names)
            if _inverts(node, path) or any(t.name in inverse for t in data):
                inverse.update(names)
    return reduced, inverse


def _inverts(node: Node, path: set[str]) -> bool:
    """True for 1/x, x^-0.5 and the like."""
    if is_op(node, "Div"):
        return node.inputs[1].name in path
    if is_op(node, "Pow"):
        exponent = scalar(node.inputs[1])
        return exponent is not None and exponent < 0
    return is_op(node, "Reciprocal")


def _scales(
    graph: Graph,
    tensor: Tensor,
    reduced: set[str],
    inverse: set[str],
    found: set[str],
    path: set[str],
) -> bool:
    """True where a reader divides data by the tensor, multiplies data by it if it is inverse, or
    computes a tensor of which that holds."""
    for node in graph.consumers(tensor):
        if any(t.name in found for t in node.outputs):
            return True
        others = [t for t in node.inputs if t is not tensor and t.name in path]
        if not others or all(t.name in reduced for t in others):
            continue
        divides = is_op(node, "Div") and node.inputs[1] is tensor
        if divides or (is_op(node, "Mul") and tensor.name in inverse):
            return True
    return False


def _is_magnitude(node: Node) -> bool:
    if is_op(node, "Pow"):
        return scalar(node.inputs[1]) == 2.0
    return is_op(node, "Abs") or (is_op(node, "Mul") and node.inputs[0] is node.inputs[1])


def _only_reduced(graph: Graph, tensor: Tensor, found: set[str]) -> bool:
    """True where all readers are reductions whose results are statistics."""
    readers = graph.consumers(tensor)
    return bool(readers) and all(
        is_op(n, *REDUCTIONS) and not is_constant(n.inputs[0]) and n.outputs[0].name in found
        for n in readers
    )
