"""Keeps ONNX Runtime from fusing Add and LayerNormalization into its slower SkipLayerNormalization.

    LayerNormalization(x + y, γ[H], β[H])   →   LayerNormalization(x + y, γ[1,H], β[1,H])

In ONNX Runtime 1.31 SkipLayerNormalization is scalar code while LayerNormalization has a vector
kernel; the fusion requires vectors of rank 1, and [1,H] broadcasts the same. Refuses parameters
that are not constant vectors. Source: ONNX Runtime skip_layer_norm_fusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, array, is_constant, is_op, rank
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class UnfuseSkipLayerNorm(Pass):
    """Give LayerNormalization parameters of shape [1,H]."""

    name: ClassVar[str] = "unfuse-skip-layernorm"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if not is_op(node, "LayerNormalization"):
                continue
            params = [t for t in node.inputs[1:] if t.name]
            if not all(is_constant(t) for t in params):
                ctx.skip(node, "scale or bias is not constant")
                continue
            if (rank(node.inputs[0]) or 2) < 2:
                ctx.skip(node, "the data is a vector")
                continue
            for i, tensor in enumerate(node.inputs[1:], 1):
                if tensor.name and rank(tensor) == 1:
                    row = array(tensor).reshape(1, -1)
                    graph.set_constant(node, i, row, f"{tensor.name}/row")
                    changed = True
        return changed
