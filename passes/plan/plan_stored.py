"""Decides which weights are 8-bit integers in the file alone. Edits nothing.

For operators without an integer kernel (the target's ``stored`` rules): the file is smaller, the
runtime multiplies by float weights as before. Decides only on constants that no pass before it has
quantized, and never on what the user wants float. Refuses constants that are small, have too few
values for each scale, or hold NaN, infinity or values that no scale represents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_float, op_name, rank
from qcompile.ir.analysis.transformer_roles import names_to_match, roles
from qcompile.planning import Context, Decision, Use, precision
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE, StoredRule

_COLUMNS = 8  # fewer values, with a scale of 4 bytes, are hardly smaller than float


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
            for slot in () if rule is None else rule.slots:
                use = Use(node.name, slot)
                if rule is None or slot >= len(node.inputs) or use in planned:
                    continue
                if _is_candidate(node.inputs[slot], rule):
                    outputs = (t.name for t in node.outputs if t.name)
                    tensors = [node.inputs[slot].name, *outputs]
                    _plan(
                        graph, ctx, node, slot, rule, names_to_match(role_of, tensors, [node.name])
                    )
        return False


def _is_candidate(tensor: Tensor, rule: StoredRule) -> bool:
    return is_constant(tensor) and is_float(tensor) and (rank(tensor) or 0) >= rule.min_rank


def _plan(
    graph: Graph, ctx: Context, node: Node, slot: int, rule: StoredRule, names: list[str]
) -> None:
    tensor, use = node.inputs[slot], Use(node.name, slot)
    choice = precision.of_weight(graph, ctx, names, rule.weight)
    refusal = ctx.choices.kept_by(names)
    if refusal is None and choice.spec is None and choice.reason:
        refusal = Refusal(choice.reason)
    rows = rule.rows if rule.rows > 0 else len(tensor.shape) + rule.rows
    refusal = refusal or _obstacle(tensor, rule, rows)
    if refusal is None:
        ctx.plan.claim((use,))
        why = choice.reason or rule.why
        ctx.plan.decide(Decision(tensor.name, "weight", choice.spec, why, (use,), stacked=rows))
    elif not any(use in d.uses for d in ctx.plan.decisions):
        ctx.skip(node, refusal.reason)
        ctx.plan.decide(Decision(tensor.name, "weight", None, refusal.reason, (use,)))


def _obstacle(tensor: Tensor, rule: StoredRule, rows: int) -> Refusal | None:
    if 4 * math.prod(tensor.shape) < rule.min_bytes:
        return Refusal(rule.small)
    if math.prod(tensor.shape[rows:]) < _COLUMNS:
        return Refusal(f"under {_COLUMNS} values per scale: not worth quantizing")
    return precision.unusable(array(tensor))
