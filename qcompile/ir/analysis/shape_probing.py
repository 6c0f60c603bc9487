"""Shapes for several assignments of numbers to the inputs' symbolic dimensions.

With numbers, slices, ranges and broadcasts have known sizes, unlike with symbols. Shape arithmetic
is evaluated alternately with ONNX inference until nothing new is found. Dimensions that depend on
the data stay symbolic. Shape functions of exported models are products, sums, minima and maxima of
dimensions: two that agree in every probe are considered equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from qcompile.ir import Graph, Node, Shape, is_op, shape_of
from qcompile.ir.analysis.constant_evaluation import Evaluator, evaluable, fold_shape, put_values
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import skeleton

# Primes, so that no product of other dimensions equals one of them by chance, and a probe of ones,
# which shows broadcasting. Small, so that position tables are long enough; and enough of them that
# no two dimensions get the same.
_MORE = tuple(n for n in range(31, 1000) if all(n % d for d in range(2, 32) if d < n))
_PROBES = ((7, 11, 3, 17, 5, 13, *_MORE), (13, 5, 19, 2, 29, 23, *_MORE), (1,))
_ROUNDS = 12
_SMALL = 4096


def probed_shapes(graph: Graph, evaluate: Evaluator) -> list[dict[str, Shape]]:
    """Shapes by tensor name, one dictionary for each probe."""
    return [_probe(graph, sizes, evaluate) for sizes in _PROBES]


def shapes_for(
    graph: Graph, inputs: Mapping[str, tuple[int, ...]], evaluate: Evaluator
) -> dict[str, Shape]:
    """Shapes by tensor name for inputs of these shapes, as far as they do not depend on data."""
    model = skeleton(graph)
    for info in model.graph.input:
        if info.name in inputs:
            dims = info.type.tensor_type.shape.dim
            del dims[:]
            for size in inputs[info.name]:
                dims.add(dim_value=size)
    return _shapes(model, evaluate)


def _probe(graph: Graph, sizes: tuple[int, ...], evaluate: Evaluator) -> dict[str, Shape]:
    model = skeleton(graph)
    _fix_inputs(model, sizes)
    return _shapes(model, evaluate)


def _shapes(model: onnx.ModelProto, evaluate: Evaluator) -> dict[str, Shape]:
    small = from_proto(model)
    seen: dict[str, Shape] = {}
    for _ in range(_ROUNDS):
        for tensor in small.outputs:
            tensor.shape = None
        infer(small)
        found = {n: s for n, t in small.tensors().items() if (s := shape_of(t)) is not None}
        seen.update(found)
        if not _fold(small, evaluate):
            break
        small.sort()
    return seen


def _fix_inputs(model: onnx.ModelProto, sizes: tuple[int, ...]) -> None:
    numbers: dict[str, int] = {}
    for info in model.graph.input:
        for i, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                key = dim.dim_param or f"{info.name}:{i}"
                dim.dim_value = numbers.setdefault(key, sizes[len(numbers) % len(sizes)])


def _fold(graph: Graph, evaluate: Evaluator) -> bool:
    changed = False
    for node in graph.nodes:
        if is_op(node, "Shape"):
            changed |= fold_shape(graph, node, shape_of(node.inputs[0]))
    nodes = evaluable(graph, _is_small)
    values = evaluate(graph, nodes) if nodes else {}
    if isinstance(values, dict):
        changed |= put_values(graph, nodes, values)
    return bool(graph.remove_dead()) or changed


def _is_small(node: Node) -> bool:
    """True where all results have a known, small size, as in shape arithmetic."""
    shapes = [shape_of(t) for t in node.outputs]
    return all(
        s is not None
        and all(isinstance(d, int) for d in s)
        and int(np.prod([int(d or 0) for d in s], dtype=np.int64)) <= _SMALL
        for s in shapes
    )
