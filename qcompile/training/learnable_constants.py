"""Which float constants of a graph training may change: weights, biases and tables.

The data starts at float inputs of the graph and at tables whose rows are looked up, and goes
through every operator. A constant is learned where an operator combines it with the data. Left out
are single numbers, masks (huge values), statistics of batch normalization, and constants that meet
only positions, as the frequencies of rotary embeddings do.
"""

from __future__ import annotations

import math

import numpy as np

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_float, is_op, rank

_LARGEST = 1e4  # masks hold float16's or float32's lowest value, or round numbers from here on
_LOOKUPS = ("Gather",)
_STATISTICS = {"BatchNormalization": (3, 4)}


def learnable_constants(graph: Graph) -> set[str]:
    """Names of the float32 constants that training may change."""
    data = {t.name for t in graph.inputs if is_float(t) and "mask" not in t.name.lower()}
    found: set[str] = set()
    for node in graph.nodes:
        table = node.inputs[0] if is_op(node, *_LOOKUPS) else None
        looks_up = table is not None and is_constant(table) and (rank(table) or 0) >= 2
        meets = any(t.name in data for t in node.inputs)
        if not (meets or (looks_up and is_float(table))):
            continue
        data |= {t.name for t in node.outputs if t.name}
        found |= {t.name for t in _operands(node) if _is_learnable(t)}
    return found


def _operands(node: Node) -> list[Tensor]:
    skipped = _STATISTICS.get(str(node.op), ())
    return [t for i, t in enumerate(node.inputs) if i not in skipped]


def _is_learnable(tensor: Tensor) -> bool:
    if not (is_constant(tensor) and is_float(tensor) and math.prod(tensor.shape) > 1):
        return False
    return bool(np.abs(array(tensor)).max() < _LARGEST)
