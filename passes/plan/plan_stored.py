"""Decides which weights are 8-bit integers in the file alone. Edits nothing.

For operators without an integer kernel (the target's ``stored`` rules): the file is smaller, the
runtime multiplies by float weights as before. Decides only on constants that no pass before it has
quantized, and never on what the user wants float. Refuses constants that are empty, hold NaN or
infinity or values that no scale represents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_float, op_name, rank
from qcompile.ir.analysis.transformer_roles import names_to_match, roles
from qcompile.planning import Context, Decision, Use, precision
from qcompile.quant import out_of_scale
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE, StoredRule


@dataclass(frozen=True)
class PlanStored(Pass):
    """Choose weights to store in 8 bits for operators that compute in float."""

    name: ClassVar[str] = "plan-stored"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-operands", "plan-convolutions", "plan-recurrent")

    def run(self, graph: Graph, ctx: Context) -> bool:
        rules = {r.op: r for r in ctx.target.stored if ctx.choices.mode in r.modes}
        if not rules or graph.opset < QDQ_SINCE:
            return False
        role_of = roles(graph)
        planned = {use for d in ctx.plan.quantized("weight") for use in d.uses}
        for node in graph.nodes:
            rule = rules.get(op_name(node))
            if rule is None:
                continue
            for slot in rule.slots:
                tensor = node.inputs[slot] if slot < len(node.inputs) else None
                if tensor is None or Use(node.name, slot) in planned or not _fits(tensor, rule):
                    continue
                tensors = [tensor.name, *(t.name for t in node.outputs if t.name)]
                names = names_to_match(role_of, tensors, [node.name])
                _plan(graph, ctx, rule, Use(node.name, slot), tensor, names)
        return False


def _fits(tensor: Tensor, rule: StoredRule) -> bool:
    """True for a float constant of the rank and the size that the rule asks for."""
    if not is_constant(tensor) or not is_float(tensor) or (rank(tensor) or 0) < rule.min_rank:
        return False
    return 4 * int(np.prod(tensor.shape, dtype=np.int64)) >= max(rule.min_bytes, 1)


def _plan(
    graph: Graph, ctx: Context, rule: StoredRule, use: Use, tensor: Tensor, names: list[str]
) -> None:
    node: Node = graph.find(use.node)
    choice = precision.of_weight(graph, ctx, names, rule.weight)
    refusal = ctx.choices.kept_by(names)
    if refusal is None and choice.spec is None and choice.reason:
        refusal = Refusal(choice.reason)
    refusal = refusal or _obstacle(tensor)
    ctx.plan.claim((use,))
    if refusal is not None:
        ctx.skip(node, refusal.reason)
        ctx.plan.decide(Decision(tensor.name, "weight", None, refusal.reason, (use,)))
        return
    rows = rule.rows if rule.rows > 0 else len(tensor.shape) + rule.rows
    why = choice.reason or rule.why
    ctx.plan.decide(Decision(tensor.name, "weight", choice.spec, why, (use,), stacked=rows))


def _obstacle(tensor: Tensor) -> Refusal | None:
    values = array(tensor)
    if not np.isfinite(values).all():
        return Refusal("the weight holds NaN or infinity")
    extremes = out_of_scale(float(values.min()), float(values.max()))
    return None if extremes is None else Refusal(f"the weight holds {extremes}")
