"""Keeps ONNX Runtime from fusing Add and LayerNormalization into the slower SkipLayerNormalization.

    LayerNormalization(x + y, γ[H], β[H])   →   LayerNormalization(x + y, γ[1,H], β[1,H])

In ONNX Runtime 1.31 SkipLayerNormalization is scalar code while LayerNormalization has a vector
kernel; the fusion requires parameters of rank 1, and [1,H] broadcasts the same way. Refuses
parameters that are not constant vectors. Source: ONNX Runtime skip_layer_norm_fusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Refusal, array, is_constant, rank
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class UnfuseSkipLayerNorm(NodeRewrite[tuple[Node, list[int]]]):
    """Give LayerNormalization parameters of shape [1,H]."""

    name: ClassVar[str] = "unfuse-skip-layernorm"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    ops: ClassVar[tuple[str, ...]] = ("LayerNormalization",)

    def match(
        self, graph: Graph, ctx: Context, node: Node
    ) -> tuple[Node, list[int]] | Refusal | None:
        """(the normalization, which of its inputs are vectors)."""
        if not all(is_constant(t) for t in node.inputs[1:] if t.name):
            return Refusal("scale or bias is not constant")
        if (rank(node.inputs[0]) or 2) < 2:
            return Refusal("the data is a vector")
        vectors = [i for i, t in enumerate(node.inputs) if i and t.name and rank(t) == 1]
        return (node, vectors) if vectors else None

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, list[int]]) -> None:
        node, vectors = match
        for i in vectors:
            vector = node.inputs[i]
            graph.set_constant(node, i, array(vector).reshape(1, -1), f"{vector.name}/row")
