"""Lets the product read the key as it lies, instead of transposing it first.

    MatMul(Q, Transpose(K, [0,2,3,1]))   →   FusedMatMul(Q, Transpose(K, [0,2,1,3]), transB=1)

Swapping the last two axes costs a strided copy; the matrix kernel reads its right operand
transposed at no cost. What is left of the permutation moves whole rows. Refuses where the
transposed tensor has other readers, or the last axis does not move next to last. Source:
ONNX Runtime com.microsoft.FusedMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import MICROSOFT, Graph, Node, is_constant, is_float, is_op
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class FuseKeyTranspose(Pass):
    """Fold the transposition of a right operand into the product."""

    name: ClassVar[str] = "fuse-key-transpose"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            transpose = graph.producer(node.inputs[1]) if is_op(node, "MatMul") else None
            if transpose is None or not is_op(transpose, "Transpose"):
                continue
            perm = list(transpose.attrs.get("perm", []))
            if len(perm) < 3 or perm[-2] < perm[-1] or is_constant(transpose.inputs[0]):
                continue  # rows stay rows: nothing strided to save
            if not is_float(node.inputs[0]):
                ctx.skip(node, "the product is not known to be float32")
                continue
            if graph.only_consumer(node.inputs[1]) is None:
                ctx.skip(node, "the transposed operand has other readers")
                continue
            _fuse(graph, node, transpose, perm)
            changed = True
        return bool(graph.remove_dead()) or changed


def _fuse(graph: Graph, node: Node, transpose: Node, perm: list[int]) -> None:
    rows = [*perm[:-2], perm[-1], perm[-2]]
    source, out = transpose.inputs[0], node.outputs[0]
    if rows == sorted(rows):
        right = source
    else:
        name = f"{transpose.outputs[0].name}/rows"
        right = graph.add("Transpose", [source], [name], {"perm": rows}).outputs[0]
        right.dtype = source.dtype
    fused = graph.add(
        "FusedMatMul",
        [node.inputs[0], right],
        [f"{out.name}/fused"],
        {"transB": 1},
        domain=MICROSOFT,
        like=out,
    )
    graph.replace_uses(out, fused.outputs[0])
