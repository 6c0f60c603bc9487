"""Writes weights that stay float in the 16-bit type in which the model stored them.

    MatMul(x, @w)   →   MatMul(x, Cast(@w : float16))
    Gather(@t, i)   →   Cast(Gather(@t : float16, i))

``raise-half`` turned them into float32, which is twice the bytes. ONNX Runtime computes a Cast of a
constant once, when it loads the model; a table keeps its type in memory, and the Cast comes after
the lookup. Only weights all whose values the 16-bit type holds. Refuses others, as where a scale
was multiplied into them; leaves small constants, scales, and vectors of quantized operators.
Rounding: in a session without optimizations, a product by a computed weight may add in another
order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import (
    HALF_TYPES,
    Constant,
    Graph,
    HalfType,
    Node,
    Tensor,
    array,
    is_float,
    is_op,
    rank,
)
from qcompile.ir.quantized_operators import quantized_operator
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import Numerics, Pass, Stage

_LEAST = 1 << 8  # elements: below, the nodes take more than they save
_FLOAT = int(onnx.TensorProto.FLOAT)


@dataclass(frozen=True)
class StoreHalf(Pass):
    """Store float weights of models in float16 or bfloat16 as they came."""

    name: ClassVar[str] = "store-half"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("raise-half",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for constant in graph.constants().values() if ctx.stored_as else ():
            if not _is_weight(graph, constant):
                continue
            half = _half_values(constant, ctx.stored_as)
            if half is None:
                if not _is_derived(ctx, constant):
                    types = " or ".join(sorted(ctx.stored_as))
                    why = f"not all values of {constant.name!r} fit {types}"
                    ctx.skip(graph.consumers(constant)[0], f"{why}: they were computed in float32")
                continue
            stored = graph.constant(f"{constant.name}/{half.dtype.name}", half)
            ctx.origins[stored.name] = ctx.origins.get(constant.name, (constant.name, None))
            _read_stored(graph, constant, stored)
            changed = True
        return changed


def _is_derived(ctx: Context, constant: Constant) -> bool:
    """True for scales and the like, which were computed in float32."""
    origin, _ = ctx.origins.get(constant.name, (constant.name, None))
    return bool(origin != constant.name)


def _is_weight(graph: Graph, constant: Constant) -> bool:
    """True for large float32 constants, but for scales and biases of quantized operators."""
    readers = graph.consumers(constant)
    size = int(np.prod(constant.shape, dtype=np.int64))
    if size < _LEAST or not is_float(constant) or not readers:
        return False
    return (rank(constant) or 0) > 1 or all(quantized_operator(n) is None for n in readers)


def _half_values(constant: Constant, types: set[HalfType]) -> Array | None:
    """The values in one of these types, None where none holds all of them."""
    values = array(constant)
    for number in (n for n, name in HALF_TYPES.items() if name in types):
        with np.errstate(over="ignore"):
            half: Array = values.astype(onnx.helper.tensor_dtype_to_np_dtype(number))
        if np.array_equal(half.astype(np.float32), values, equal_nan=True):
            return half
    return None


def _read_stored(graph: Graph, constant: Constant, stored: Constant) -> None:
    """Let all readers of a float32 constant read the stored one, behind one Cast or a lookup."""
    cast: Tensor | None = None
    for node, slot in graph.slots(constant):
        if is_op(node, "Gather") and slot == 0:
            graph.set_input(node, 0, stored)
            _cast_rows(graph, node, stored)
            continue
        if cast is None:
            name = f"{constant.name}/float32"
            cast = graph.add("Cast", [stored], [name], {"to": _FLOAT}, like=constant).outputs[0]
        graph.set_input(node, slot, cast)


def _cast_rows(graph: Graph, lookup: Node, table: Constant) -> None:
    out = lookup.outputs[0]
    rows = graph.divert_output(lookup, "rows")
    rows.dtype, rows.shape = table.dtype, out.shape
    graph.add("Cast", [rows], [out], {"to": _FLOAT})
