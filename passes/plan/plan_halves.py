"""Asks for the extrema of all float data, so that what float16 cannot hold stays float32.

Without data (mode float, weight-only) nothing is known; outputs that overflow fail the gates then.
Edits neither graph nor plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, is_constant
from qcompile.ir.analysis.data_path import data_path, layout_root
from qcompile.planning import Context
from qcompile.quant import QSpec
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class PlanHalves(Pass):
    """Ask for the extrema of tensors that are to become float16."""

    name: ClassVar[str] = "plan-halves"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-interior", "plan-joins", "plan-operands")

    def run(self, graph: Graph, ctx: Context) -> bool:
        if ctx.choices.mode != "static":
            return False
        tensors = graph.tensors()
        known = {request.tensor for request in ctx.requests}
        for name in sorted(data_path(graph, dequantized=True)):
            root = layout_root(graph, tensors[name])
            if root.name not in known and not is_constant(root):
                known.add(root.name)
                ctx.request(root.name, QSpec("int8", symmetric=True), extrema=True)
        return False
