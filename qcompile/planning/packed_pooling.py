"""Pooling over positions, and the same on packed rows: those of real tokens alone.

    x[B,S,H] · m[B,S,1] → ReduceSum over S          →   Scan over sentences: Σ of rows x[T,H] · m[T]
    Where(m, x[B,S,H], least) → ReduceMax over S    →   Scan over sentences: max of rows x[T,H]

T is the number of real tokens. Poolings are found by what they compute, whoever exported them: a
sum whose summands are 0 at padding, a maximum whose values are hidden there. The rows of a sentence
are adjacent, so Scan slices them: its time grows with the number of tokens, and no sentence sees
another one's values. The alternatives in ONNX Runtime 1.32 are wrong or slower: ScatterND that adds
or takes the maximum is a data race between threads (sums change from run to run), ScatterElements
takes ten times as long, and a matrix [B, T] of ones and zeros grows with B·T and lets NaN of one
sentence into all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from qcompile.ir import (
    Graph,
    Node,
    Tensor,
    array,
    is_constant,
    is_op,
    is_zero,
    scalar,
    shape_of,
)
from qcompile.ir.analysis.data_path import MASK
from qcompile.ir.operators import RESHAPES
from qcompile.ir.pooling import reduced, with_axes
from qcompile.ir.subgraph import Subgraph
from qcompile.quant import Array

_SEQUENCE = (1, -2)  # axis of the positions in [batch, sequence, channels]
_SAME = ("Cast", "Expand", "Identity", *RESHAPES)
_HIDING = -1e4  # a masking constant is below: no activation is as small
Kind = Literal["sum", "max"]


@dataclass(frozen=True)
class Pooling:
    """One pooling of a tensor [batch, sequence, channels].

    node: whose result is the pooled tensor. states: what is pooled. weights: of the positions,
    [batch, sequence, 1] or [batch, 1, sequence], 0 at padding; None for 1 at real positions. least:
    the maximum where nothing is real.
    """

    kind: Kind
    node: Node
    states: Tensor
    weights: Tensor | None = None
    least: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Where rows of real tokens are: tensors that are computed once, int64.

    real: flat positions of the rows, (T,). row: the row of each position, (B·S,). sizes: [B, S].
    starts, ends: of the rows of each sentence, (B, 1).
    """

    real: Tensor
    row: Tensor
    sizes: Tensor
    starts: Tensor
    ends: Tensor


def poolings_of(graph: Graph, states: Tensor, reader: Node) -> list[Pooling]:
    """What a reader of states does, if all that comes of it is pooling; else nothing."""
    if is_op(reader, "ReduceSum"):
        summed = _over_positions(reader) and is_zero_at_padding(graph, states)
        return [Pooling("sum", reader, states)] if summed else []
    if is_op(reader, "MatMul"):
        return _multiplied(graph, states, reader)
    if is_op(reader, "Mul"):
        return _weighted(graph, states, reader)
    return _hidden(graph, states, reader) if is_op(reader, "Where") else []


def _multiplied(graph: Graph, states: Tensor, node: Node) -> list[Pooling]:
    """Weights [batch, 1, sequence] times states."""
    left, right = node.inputs
    known = shape_of(left)
    fits = known is not None and len(known) == 3 and known[1] == 1 and right is states
    if not fits or not is_zero_at_padding(graph, left, channels=1):
        return []
    return [Pooling("sum", node, states, weights=left)]


def _weighted(graph: Graph, states: Tensor, node: Node) -> list[Pooling]:
    """The sums of states times weights."""
    weights = next((t for t in node.inputs if t is not states), None)
    if weights is None or not is_zero_at_padding(graph, weights):
        return []
    sums = _reductions(graph, node, "ReduceSum")
    if not sums or _narrow(graph, weights) is None:
        return []
    return [Pooling("sum", s, states, weights=weights) for s in sums]


def _hidden(graph: Graph, states: Tensor, node: Node) -> list[Pooling]:
    """Maxima or sums of states where the mask is not 0."""
    condition, shown, other = node.inputs
    if shown is states and _is_mask(graph, condition):
        least = scalar(other)
    elif other is states and _is_mask(graph, condition, inverted=True):
        other, least = shown, scalar(shown)
    else:
        return []
    if least == 0:
        return [Pooling("sum", s, states) for s in _reductions(graph, node, "ReduceSum")]
    if least is None or least > _HIDING:
        return []
    maxima = _reductions(graph, node, "ReduceMax")
    return [Pooling("max", m, states, least=other) for m in maxima]


def _reductions(graph: Graph, node: Node, op: str) -> list[Node]:
    """The reductions over positions that read a node's result; nothing if another node does."""
    made = node.outputs[0]
    readers = graph.consumers(made)
    alone = all(is_op(r, op) and _over_positions(r) for r in readers)
    return readers if alone and not graph.is_output(made) else []


def _over_positions(node: Node) -> bool:
    """True where a reduction is over the positions alone."""
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1 and node.inputs[1].name:
        axes = array(node.inputs[1]).tolist() if is_constant(node.inputs[1]) else None
    return axes is not None and len(axes) == 1 and axes[0] in _SEQUENCE


def is_zero_at_padding(graph: Graph, tensor: Tensor, channels: int = 2) -> bool:
    """True where a tensor is 0 wherever the mask is, whatever else it is computed from.

    Of its three axes, ``channels`` and not another is the one that the mask does not have.
    """
    if tensor.name == MASK:
        return True
    node = graph.producer(tensor)
    if node is None:
        return False
    first = node.inputs[0]
    if is_op(node, *_SAME, "Div"):
        return _keeps_axes(node, channels) and is_zero_at_padding(graph, first, channels)
    if is_op(node, "And", "Mul"):
        return any(is_zero_at_padding(graph, t, channels) for t in node.inputs)
    if is_op(node, "Greater"):
        bound = scalar(node.inputs[1])
        return bound is not None and bound >= 0 and is_zero_at_padding(graph, first, channels)
    if is_op(node, "Equal"):
        return bool(scalar(node.inputs[1])) and is_zero_at_padding(graph, first, channels)
    if is_op(node, "Not"):
        return _is_mask(graph, first, inverted=True)
    if is_op(node, "Where"):
        zero = is_constant(node.inputs[2]) and is_zero(node.inputs[2])
        return zero and is_zero_at_padding(graph, first, channels)
    return False


def _is_mask(graph: Graph, tensor: Tensor, *, inverted: bool = False) -> bool:
    """True where a tensor is not 0 exactly where the mask is not, or where it is if inverted."""
    if tensor.name == MASK:
        return not inverted
    node = graph.producer(tensor)
    if node is None:
        return False
    if is_op(node, *_SAME):
        return _keeps_axes(node, 2) and _is_mask(graph, node.inputs[0], inverted=inverted)
    opposite = is_op(node, "Not") or (is_op(node, "Equal") and scalar(node.inputs[1]) == 0)
    return opposite and _is_mask(graph, node.inputs[0], inverted=not inverted)


def _keeps_axes(node: Node, channels: int) -> bool:
    """False where a new shape may move positions to another axis than that of the states."""
    known = shape_of(node.outputs[0])
    adds_one = known is not None and len(known) == 3 and known[channels] == 1
    return adds_one or not is_op(node, *RESHAPES)


def _narrow(graph: Graph, weights: Tensor) -> tuple[Tensor, list[int]] | None:
    """Weights [batch, sequence, 1] before they were repeated for all channels.

    With the types to which they were cast since, the last first; None for weights of channels.
    """
    casts: list[int] = []
    while True:
        known = shape_of(weights)
        if known is not None and len(known) == 3 and known[2] == 1:
            return weights, casts
        node = graph.producer(weights, "Cast", "Expand", "Identity")
        if node is None:
            return None
        if is_op(node, "Cast"):
            casts.append(node.attrs["to"])
        weights = node.inputs[0]


# ---- on packed rows

_PREFIX = "pooling/"


def pool_rows(graph: Graph, pooling: Pooling, packed: Tensor, rows: Rows) -> None:
    """Compute a pooling from the rows of real tokens, ``packed`` [T, channels]."""
    node = pooling.node
    pooled = _scanned(graph, packed, pooling, rows)
    if pooling.least is not None:
        pooled = _add(graph, "Max", [pooled, pooling.least])
    if not (is_op(node, "MatMul") or node.attrs.get("keepdims", 1)):
        pooled = with_axes(graph, "Squeeze", pooled, (1,))
    pooled.dtype, pooled.shape = node.outputs[0].dtype, node.outputs[0].shape
    graph.replace_uses(node.outputs[0], pooled)


def _scanned(graph: Graph, packed: Tensor, pooling: Pooling, rows: Rows) -> Tensor:
    """The sum or the maximum of the rows of each sentence, [B, 1, channels]."""
    weights = None
    if pooling.weights is not None:
        every = _by_position(graph, pooling.weights, rows)
        flat = graph.constant(f"{_PREFIX}flat", _int64([1, -1]))
        weights = _add(graph, "Reshape", [every, flat])
        weights = _add(graph, "Gather", [weights, rows.real], axis=1)
        _count_once(graph, pooling.weights, every)
    body = _body(packed, weights, pooling.kind, graph.opset)
    inputs, attrs = [rows.starts, rows.ends], {"body": body, "num_scan_inputs": 2}
    made: Tensor = graph.add("Scan", inputs, [f"{_PREFIX}{pooling.kind}"], attrs).outputs[0]
    return made


def _body(packed: Tensor, weights: Tensor | None, kind: Kind, opset: int) -> Subgraph:
    """The pooling of the rows from ``start`` to ``end``."""
    helper, integers = onnx.helper, onnx.TensorProto.INT64
    kinds = onnx.helper.np_dtype_to_tensor_dtype(packed.dtype)
    bounds = [helper.make_tensor_value_info(n, integers, [1]) for n in ("start", "end")]
    result = helper.make_tensor_value_info("pooled", kinds, [1, None])
    constants = [helper.make_tensor("rows", integers, [1], [0])]
    nodes = [helper.make_node("Slice", [packed.name, "start", "end", "rows"], ["own"])]
    if weights is not None:
        constants.append(helper.make_tensor("columns", integers, [1], [1]))
        nodes.append(helper.make_node("Slice", [weights.name, "start", "end", "columns"], ["by"]))
        nodes.append(helper.make_node("MatMul", ["by", "own"], ["pooled"]))
    elif kind == "sum":
        nodes.append(helper.make_node("ReduceSum", ["own", "rows"], ["pooled"]))
    elif opset < 18:
        nodes.append(helper.make_node("ReduceMax", ["own"], ["pooled"], axes=[0]))
    else:
        nodes.append(helper.make_node("ReduceMax", ["own", "rows"], ["pooled"]))
    return Subgraph(helper.make_graph(nodes, "of_sentence", bounds, [result], constants))


def _by_position(graph: Graph, weights: Tensor, rows: Rows) -> Tensor:
    """One weight for each position, [B, S]."""
    known, casts, axis = shape_of(weights), list[int](), 1
    if known is None or len(known) != 3 or known[1] != 1:
        narrow, axis = _narrow(graph, weights), 2
        assert narrow is not None  # poolings_of refuses others
        weights, casts = narrow
    made = with_axes(graph, "Squeeze", weights, (axis,))
    for kind in reversed(casts):
        made = _add(graph, "Cast", [made], to=kind)
    return _add(graph, "Expand", [made, rows.sizes])


def _count_once(graph: Graph, weights: Tensor, every: Tensor) -> None:
    """Sum weights that are repeated for all channels before that: Expand after ReduceSum.

    every: the weight of each position, [B, S].
    """
    known = shape_of(weights)
    width = known[-1] if known else None
    if graph.producer(weights, "Expand", "Cast") is None or not isinstance(width, int):
        return
    for node in graph.consumers(weights):
        if width == 1 or not is_op(node, "ReduceSum") or not _over_positions(node):
            continue
        total, shape = reduced(graph, "ReduceSum", every, (1,), keepdims=1), [1, width]
        if node.attrs.get("keepdims", 1):
            total, shape = with_axes(graph, "Unsqueeze", total, (2,)), [1, 1, width]
        repeated = [total, graph.constant(f"{_PREFIX}repeated", _int64(shape))]
        graph.replace_uses(node.outputs[0], _add(graph, "Expand", repeated))


def _int64(values: int | list[int]) -> Array:
    return np.array(values, np.int64)


def _add(graph: Graph, op: str, inputs: Sequence[Tensor], **attrs: int) -> Tensor:
    made: Tensor = graph.add(op, inputs, [f"{_PREFIX}{op}"], attrs).outputs[0]
    return made
