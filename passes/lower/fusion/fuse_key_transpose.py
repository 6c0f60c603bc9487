"""Fuses the transposition of the key into the matrix multiplication that reads it.

    MatMul(Q, Transpose(K, [0,2,3,1]))   →   FusedMatMul(Q, Transpose(K, [0,2,1,3]), transB=1)

Swapping the last two axes costs a strided copy; the matrix kernel reads a transposed right operand
at no cost. The rest of the permutation moves whole rows. Refuses where the transposed tensor has
other readers. Source: ONNX Runtime com.microsoft.FusedMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import MICROSOFT, Graph, Node, Refusal, is_constant, is_float
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class FuseKeyTranspose(NodeRewrite[tuple[Node, Node]]):
    """Fuse the transposition of a right operand into the MatMul."""

    name: ClassVar[str] = "fuse-key-transpose"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    ops: ClassVar[tuple[str, ...]] = ("MatMul",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the MatMul, the Transpose of its right operand)."""
        transpose = graph.producer(node.inputs[1], "Transpose")
        if transpose is None:
            return None
        perm = transpose.attrs.get("perm", [])
        if len(perm) < 3 or perm[-2] < perm[-1] or is_constant(transpose.inputs[0]):
            return None  # rows stay contiguous: there is no strided copy to save
        if not is_float(node.inputs[0]):
            return Refusal("the MatMul is not known to be float32")
        if graph.only_consumer(node.inputs[1]) is None:
            return Refusal("the transposed operand has other readers")
        return node, transpose

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        node, transpose = match
        *others, last, before = transpose.attrs["perm"]
        rows = [*others, before, last]
        right = source = transpose.inputs[0]
        if rows != sorted(rows):
            name = f"{transpose.outputs[0].name}/rows"
            right = graph.add("Transpose", [source], [name], {"perm": rows}).outputs[0]
            right.dtype = source.dtype
        inputs, attrs = [node.inputs[0], right], {"transB": 1}
        graph.substitute(node.outputs[0], "FusedMatMul", inputs, "fused", attrs, domain=MICROSOFT)
