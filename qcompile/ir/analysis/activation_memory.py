"""How much memory a model's activations take at once, for inputs of given shapes.

A tensor lives from the node that computes it to the last that reads it, in the order of the graph,
which is the runtime's. Fused operators take less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qcompile.ir import Graph, Shape, Tensor, is_constant
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.analysis.shape_probing import shapes_for
from qcompile.ir.graph import reads

_UNKNOWN_ITEM = 4


@dataclass(frozen=True)
class Footprint:
    """Largest number of bytes alive at once; name and bytes of the largest tensor."""

    bytes: int
    tensor: str
    largest: int


def footprint(
    graph: Graph, evaluate: Evaluator, inputs: Mapping[str, tuple[int, ...]]
) -> Footprint:
    """Memory of activations for inputs of these shapes, without shapes that depend on data."""
    shapes = shapes_for(graph, inputs, evaluate)
    sizes = {name: _bytes(t, shapes.get(name)) for name, t in _activations(graph).items()}
    last = {name: i for i, node in enumerate(graph.nodes) for name in reads(node)}
    ends = {t.name for t in graph.outputs}
    alive = {t.name: sizes.get(t.name, 0) for t in graph.inputs}
    peak = now = sum(alive.values())
    for i, node in enumerate(graph.nodes):
        now += sum(sizes.get(t.name, 0) for t in node.outputs)
        peak = max(peak, now)
        names = {*reads(node), *(t.name for t in node.outputs)}
        now -= sum(sizes.get(n, 0) for n in names if last.get(n, i) == i and n not in ends)
    tensor = max(sizes, key=lambda n: sizes[n], default="")
    return Footprint(peak, tensor, sizes.get(tensor, 0))


def _activations(graph: Graph) -> dict[str, Tensor]:
    return {name: t for name, t in graph.tensors().items() if not is_constant(t)}


def _bytes(tensor: Tensor, shape: Shape | None) -> int:
    if shape is None or not all(isinstance(d, int) for d in shape):
        return 0
    try:
        item = np.dtype(tensor.dtype).itemsize if tensor.dtype is not None else _UNKNOWN_ITEM
    except TypeError:  # an ONNX enum for a type numpy lacks
        item = _UNKNOWN_ITEM
    return math.prod(int(d or 0) for d in shape) * item
