"""Dequantizes only the rows that are looked up, instead of the whole table.

    Gather(DQ(Tq, s, axis=0), i)              →   Mul(Cast(Gather(Tq, i)), Gather(s[V,1], i))
    Gather(Transpose(DQ(Wq, s, axis=1)), i)   →   the same with Tq = Transpose(Wq)

ONNX Runtime does not move a DequantizeLinear after a Gather: it would dequantize the table in every
run. There is one scale per row. The Transpose of a constant is computed when the model is loaded.
Refuses tables that are not symmetric int8 per row, and lookups along another axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import Graph, Node, Refusal, array, is_constant, is_zero, rank, shape_of
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class LowerEmbeddings(NodeRewrite[tuple[Node, Node]]):
    """Apply an embedding's scale after the lookup."""

    name: ClassVar[str] = "lower-embeddings"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("Gather",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the lookup, the DequantizeLinear of its table)."""
        turned = _transpose(graph, node)
        source = node.inputs[0] if turned is None else turned.inputs[0]
        table = graph.producer(source, "DequantizeLinear")
        if table is None:
            return None
        rows = 0 if turned is None else 1
        return _obstacle(node, table, rows) or (node, table)

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        node, table = match
        quantized, scale = table.inputs[:2]
        turned = _transpose(graph, node)
        if turned is not None:
            name = f"{quantized.name}/transposed"
            quantized = graph.add("Transpose", [quantized], [name], turned.attrs).outputs[0]
        indices, out = node.inputs[1], node.outputs[0]
        column = graph.constant(f"{scale.name}/column", array(scale).reshape(-1, 1))
        ctx.origins[column.name] = ctx.origins.get(scale.name, (scale.name, None))
        rows = graph.add("Gather", [quantized, indices], [f"{out.name}/rows"], {"axis": 0})
        kind = onnx.helper.np_dtype_to_tensor_dtype(scale.dtype)  # float16 where the model has that
        real = graph.add("Cast", [rows.outputs[0]], [f"{out.name}/cast"], {"to": int(kind)})
        scales = graph.add("Gather", [column, indices], [f"{out.name}/scales"], {"axis": 0})
        graph.substitute(out, "Mul", [real.outputs[0], scales.outputs[0]], "scaled")


def _transpose(graph: Graph, node: Node) -> Node | None:
    """The Transpose of a matrix in which rows are looked up, None where there is none."""
    turned = graph.producer(node.inputs[0], "Transpose")
    return turned if turned is not None and turned.attrs.get("perm") == [1, 0] else None


def _obstacle(node: Node, table: Node, axis: int) -> Refusal | None:
    """Why the rows, along an axis of what is dequantized, cannot be looked up as integers."""
    matrix, scale = table.inputs[:2]
    if not is_constant(matrix) or rank(matrix) != 2:
        return Refusal("the table is not a constant matrix")
    if matrix.dtype != np.int8 or not all(is_zero(t) for t in table.inputs[2:]):
        return Refusal("the table is not symmetric int8")
    along = table.attrs.get("axis", 1) in (axis, axis - 2)
    by_row = shape_of(scale) == (matrix.shape[axis],) and along
    if not is_constant(scale) or not by_row:
        return Refusal("the table does not have one scale per row")
    if node.attrs.get("axis", 0) not in (0, -2):
        return Refusal("the lookup is not along the rows of the table")
    return None
