"""Which tensors reach further the larger an open dimension is, whatever the calibration data.

- A sum over n values, of a matrix multiplication of two activations or a ReduceSum, grows with n.
  So does what is computed from it, up to the next normalization.
- Scores: the largest of n decides what a softmax gives. Among more keys it is larger, and a range
  from short rows clips just those that carry the weight.

Where n is fixed, the data was calibrated at it. Means are no such sums, nor are sums that
probabilities weight, since these sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_op, shape_of
from qcompile.ir.analysis.data_path import data_path
from qcompile.ir.operators import (
    CONVOLUTIONS,
    ELEMENTWISE,
    LAYOUT,
    MATMULS,
    NORMALIZATIONS,
    REDUCTIONS,
)
from qcompile.planning.probabilities import OPEN, probability_rows
from qcompile.planning.row_statistics import row_statistics

SUM = "it is a sum over a dimension of open size, and grows with it"
SCORES = "attention scores over an open length: the longest row decides how large they become"

_SUMS = ("CumSum", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSum", "ReduceSumSquare")
# Their results do not grow with their operands.
_BOUNDED = (
    *NORMALIZATIONS, "Clip", "Cos", "Erf", "GroupNormalization", "HardSigmoid",
    "InstanceNormalization", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization",
    "Sigmoid", "Sign", "Sin", "Softmax", "Softsign", "Tanh",
)  # fmt: skip
_PRODUCTS = (*MATMULS, *CONVOLUTIONS, "Einsum", "Gemm")


def open_sizes(graph: Graph) -> dict[str, str]:
    """By the name of each such tensor on the data path, why no data gives it a range."""
    path, rows = data_path(graph), probability_rows(graph)
    scores, growing = _scores(graph, path, rows), _growing(graph, path, rows)
    return dict.fromkeys(scores, SCORES) | dict.fromkeys(growing, SUM)


def _growing(graph: Graph, path: set[str], rows: Mapping[str, float]) -> set[str]:
    """Sums over open dimensions, and what is computed from them without a normalization."""
    found: set[str] = set()
    statistics = row_statistics(graph)
    for node in graph.nodes:
        grown = any(t.name in found for t in node.inputs)
        if _is_open_sum(node, path, rows) or (grown and not _bounds(node, statistics)):
            found |= {t.name for t in node.outputs if t.name in path}
    return found


def _is_open_sum(node: Node, path: set[str], rows: Mapping[str, float]) -> bool:
    operands = [t for t in node.inputs[:2] if t.name in path and not is_constant(t)]
    if not operands or any(t.name in rows for t in operands):
        return False
    if is_op(node, *_SUMS):
        return _is_open(node.inputs[0], _axes(node))
    if not is_op(node, *MATMULS, "Gemm") or len(operands) < 2:
        return False
    attrs = node.attrs
    left, right = (-2 if attrs.get(key, 0) else -1 for key in ("transA", "transB"))
    right = -3 - right  # the other one of the last two axes
    return _is_open(node.inputs[0], [left]) and _is_open(node.inputs[1], [right])


def _axes(node: Node) -> list[int]:
    """The axes of a sum; empty for all."""
    if len(node.inputs) > 1 and is_constant(node.inputs[1]):
        return [int(i) for i in array(node.inputs[1]).flat]
    return [int(i) for i in node.attrs.get("axes", ())]


def _is_open(tensor: Tensor, axes: list[int]) -> bool:
    """True where one of these axes has no fixed size."""
    shape = shape_of(tensor)
    if shape is None:
        return True
    within = [i for i in axes if -len(shape) <= i < len(shape)] or range(len(shape))
    return not all(isinstance(shape[i], int) for i in within)


def _bounds(node: Node, statistics: set[str]) -> bool:
    """True where a result does not grow with the operands, or is divided by what grows alike."""
    if is_op(node, "Div"):
        return not is_constant(node.inputs[1])
    if is_op(node, "Mul"):
        return any(t.name in statistics for t in node.inputs)
    return is_op(node, *_BOUNDED)


def _scores(graph: Graph, path: set[str], rows: Mapping[str, float]) -> set[str]:
    """What a softmax over rows of any length reads, back to the multiplication that computes it.

    Not what is also read for another purpose, such as hidden states that weight themselves.
    """
    found: set[str] = set()
    open_rows = {name for name, length in rows.items() if length == OPEN}
    way = [
        node
        for node in graph.nodes
        if is_op(node, "Softmax", "Exp") and node.outputs[0].name in open_rows
    ]
    known = {node.name for node in way}
    while way:
        for tensor in way.pop().inputs:
            node, readers = graph.producer(tensor), graph.consumers(tensor)
            if node is None or tensor.name not in path or tensor.name in found:
                continue
            if not all(n.name in known or is_op(n, *REDUCTIONS) for n in readers):
                continue
            if is_op(node, *ELEMENTWISE, *LAYOUT, *_PRODUCTS):
                found.add(tensor.name)
            if is_op(node, *ELEMENTWISE, *LAYOUT):
                known.add(node.name)
                way.append(node)
    return found
