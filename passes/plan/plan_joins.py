"""Asks for the ranges of what Concat and the like join, where the joined tensor gets integers.

Decides nothing: ``guard-joins`` compares the ranges when they are known. Tensors that have a range
by their nature, such as probabilities, need none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, is_constant
from qcompile.planning import Context
from qcompile.planning.joins import branches
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class PlanJoins(Pass):
    """Ask for the ranges of the branches of joined tensors."""

    name: ClassVar[str] = "plan-joins"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = (
        "plan-operands",
        "plan-convolutions",
        "plan-products",
        "plan-interior",
    )

    def run(self, graph: Graph, ctx: Context) -> bool:
        if ctx.choices.mode != "static":
            return False
        tensors = graph.tensors()
        asked = {request.tensor for request in ctx.requests}
        for decision in list(ctx.plan.quantized("activation")):
            if decision.spec is None or decision.tensor not in asked:
                continue
            joined = branches(graph, tensors[decision.tensor])
            for branch in (b.tensor for b in joined):
                known = branch.name in asked or ctx.ranges.get(branch.name) is not None
                if not known and not is_constant(branch):
                    ctx.request(branch.name, decision.spec)
                    asked.add(branch.name)
        return False
