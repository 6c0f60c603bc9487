"""Lets ONNX Runtime turn stored weights to float once, when it loads the model.

    Reshape(DQ(Wq, s, axis=0), shape)   →   Reshape(Mul(Cast(Wq), s[rows, 1]), shape)

ONNX Runtime keeps every DequantizeLinear and runs it in each call, also for a constant; Cast and
Mul of constants are folded at load, and the operator packs the result as any float weight. So the
file has integers, and speed and memory are those of the float model. Only weights that
``plan-stored`` chose have such a Reshape. Refuses weights that are not symmetric int8 per row.
Source: ONNX Runtime constant_folding.cc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import Graph, Node, Refusal, array, is_constant, is_op, is_zero, rank, shape_of
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class DequantizeAtLoad(NodeRewrite[Node]):
    """Write the dequantizer of a stored weight so that it is folded at load."""

    name: ClassVar[str] = "dequantize-at-load"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "lower-recurrent")
    ops: ClassVar[tuple[str, ...]] = ("DequantizeLinear",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> Node | Refusal | None:
        values, scale = node.inputs[:2]
        readers = graph.consumers(node.outputs[0])
        if not is_constant(values) or not all(is_op(n, "Reshape") for n in readers):
            return None
        by_row = node.attrs.get("axis", 1) == 0 and shape_of(scale) == tuple(values.shape[:1])
        symmetric = values.dtype == np.int8 and all(is_zero(t) for t in node.inputs[2:])
        if rank(values) != 2 or not by_row or not symmetric or not is_constant(scale):
            return Refusal("the weight is not symmetric int8 per row")
        return node

    def rewrite(self, graph: Graph, ctx: Context, match: Node) -> None:
        values, scale = match.inputs[:2]
        out = match.outputs[0]
        column = graph.constant(f"{scale.name}/column", array(scale).reshape(-1, 1))
        ctx.origins[column.name] = ctx.origins.get(scale.name, (scale.name, None))
        kind = onnx.helper.np_dtype_to_tensor_dtype(scale.dtype)
        real = graph.add("Cast", [values], [f"{out.name}/cast"], {"to": int(kind)})
        graph.substitute(out, "Mul", [real.outputs[0], column], "scaled")
