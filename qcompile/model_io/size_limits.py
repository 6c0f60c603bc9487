"""Sizes that no model means: what a few bytes of a file would make the runtime allocate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx

from qcompile.errors import ModelError
from qcompile.ir.graph import Graph, has_subgraph, is_constant

# ONNX Runtime computes what depends on constants alone when it loads a model.
MOST_FOLDED = 1 << 30
MOST_COMPUTED = 1 << 36
MOST_AXES = 64  # of a numpy array
_NARROW = 1  # bytes of an element of a type that numpy lacks


def check_sizes(graph: Graph, types: Mapping[str, onnx.ValueInfoProto]) -> int:
    """Elements of the longest vector.

    Raises ModelError where a tensor is absurd by its inferred type.

    That is over 1 GiB, and over 4 times the largest constant, of what constants alone make; over
    64 GiB of anything; or over 64 axes. Dimensions that are no numbers count as 1.
    """
    made_of, longest = _constant_bytes(graph), 0
    for name, info in types.items():
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        if len(dims) > MOST_AXES:
            raise ModelError(f"tensor {name!r} has {len(dims)} axes, at most {MOST_AXES} expected")
        size = math.prod((d for d in dims if d > 0), start=_item_bytes(info))
        if len(dims) < 2:
            longest = max(longest, *dims, 0)
        most = max(MOST_FOLDED, 4 * made_of[name]) if name in made_of else MOST_COMPUTED
        if size > most:
            raise ModelError(f"tensor {name!r} of shape {dims} takes {size} bytes, over {most}")
    return longest


def _item_bytes(info: onnx.ValueInfoProto) -> int:
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    except KeyError:
        return _NARROW
    return int(kind.itemsize)


def _constant_bytes(graph: Graph) -> dict[str, int]:
    """Tensors that depend on constants alone: bytes of the largest, 8 an element at most."""
    found = {name: 8 * math.prod(t.shape) for name, t in graph.constants().items()}
    for node in graph.nodes:
        given = [t.name for t in node.inputs if t.name]
        if given and not has_subgraph(node) and all(name in found for name in given):
            largest = max(found[name] for name in given)
            found.update((t.name, largest) for t in node.outputs if not is_constant(t))
    return found
