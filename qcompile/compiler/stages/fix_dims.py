"""Gives symbolic dimensions of the inputs a size for good: what depends on them alone is folded."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.errors import RecipeError
from qcompile.ir import Graph
from qcompile.rewriting.registry import nearest


def fix_dims(graph: Graph, dims: Mapping[str, int]) -> None:
    """Replace dimensions by name, in inputs and outputs as declared.

    Raises RecipeError for a name that no input has.
    """
    known = {d for t in graph.inputs for d in t.shape or () if isinstance(d, str)}
    for name in dims:
        if name not in known:
            hint = nearest(name, sorted(known)) if known else ": none has a name"
            raise RecipeError(f"no dimension of the model's inputs is named {name!r}{hint}")
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.shape is not None:
            tensor.shape = [dims.get(d, d) if isinstance(d, str) else d for d in tensor.shape]
    for info in graph.header.interface.values():
        for dim in info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ():
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
