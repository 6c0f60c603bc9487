"""Carries out the plan: quantized weights, and quantizers on activations.

    weight:               W           →   DequantizeLinear(Wq, scale)
    activation, static:   x           →   DequantizeLinear(QuantizeLinear(x, s, z), s, z)
    static, 7 bits:       x           →   DequantizeLinear(Clip(QuantizeLinear(x, s, z)), s, z)
    activation, dynamic:  x           →   DequantizeLinear(DynamicQuantizeLinear(x))

One pair per tensor, shared by all its planned uses: Q, K and V read one quantized input. Refuses an
activation without a calibrated range; where the rule needs both operands quantized, the operator's
weight then stays float too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Tensor
from qcompile.planning import (
    Context,
    Decision,
    dequantized_activation,
    dequantized_weight,
    float_without_range,
)
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Insert Q/DQ nodes as planned."""

    name: ClassVar[str] = "insert-qdq"
    stage: ClassVar[Stage] = Stage.INSERT
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, graph: Graph, ctx: Context) -> bool:
        float_without_range(ctx)
        decisions = [d for d in ctx.plan.quantized() if _is_pending(graph, d)]
        for decision in decisions:
            is_weight = decision.kind == "weight"
            make = dequantized_weight if is_weight else dequantized_activation
            _redirect(graph, decision, make(graph, ctx, decision))
        return bool(decisions)


def _is_pending(graph: Graph, decision: Decision) -> bool:
    """False once carried out: the uses then read a DequantizeLinear."""
    use = decision.uses[0]
    return bool(graph.find(use.node).inputs[use.index].name == decision.tensor)


def _redirect(graph: Graph, decision: Decision, result: Tensor) -> None:
    for use in decision.uses:
        graph.set_input(graph.find(use.node), use.index, result)
