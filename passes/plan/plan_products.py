"""Plans the products of attention in integers: query with key, probabilities with value.

Both operands are activations, so both get a quantizer: uint8 on the left, and on the right what the
target's kernels ask for. Which products is the recipe's ``attention``: the scores lose next to
nothing and gain most; the context (probabilities with value) loses a little more. Probabilities
lie in [0, 1] whatever the data, so their range is not calibrated. A range is asked for where the
values are made, before they are moved per head: there padding can be told from text. One operand
that stays float keeps the other float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, is_constant, is_float, is_op
from qcompile.ir.analysis.data_path import movers_before
from qcompile.ir.analysis.transformer_roles import Role, names_to_match, roles
from qcompile.planning import Context, Decision, Use, precision
from qcompile.quant import QSpec, Range
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE

_OPERANDS = {"scores": ("query", "key"), "context": ("probabilities", "value")}
_ASKED = {"scores": ("scores",), "all": ("scores", "context")}


@dataclass(frozen=True)
class _Operand:
    """What one side of a product reads: the values before they are moved, and who reads those."""

    tensor: Tensor
    spec: QSpec
    use: Use


@dataclass(frozen=True)
class PlanProducts(Pass):
    """Choose products of attention to run in integers."""

    name: ClassVar[str] = "plan-products"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-operands",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        asked = _ASKED.get(ctx.choices.attention, ())
        if ctx.choices.mode != "static" or not asked:
            return False
        if graph.opset < QDQ_SINCE:
            return False  # plan-operands has said so
        if ctx.target.product is None:
            ctx.skip(graph.name, f"target {ctx.target.name!r} has no integer products of two data")
            return False
        found = roles(graph)
        for node in graph.nodes:
            if is_op(node, "MatMul") and _kind(node, found) in asked:
                _plan(graph, ctx, node, found)
        return False


def _kind(node: Node, found: Mapping[str, Role]) -> str | None:
    """Which product of attention a node computes."""
    names = [found[t.name].names if t.name in found else () for t in node.inputs]
    for kind, (left, right) in _OPERANDS.items():
        if left in names[0] and right in names[1]:
            return kind
    return None


def _plan(graph: Graph, ctx: Context, node: Node, found: Mapping[str, Role]) -> None:
    rule = ctx.target.product
    assert rule is not None and rule.activation is not None and rule.right is not None
    operands = [_operand(graph, node, i, s) for i, s in enumerate((rule.activation, rule.right))]
    refusal = _obstacle(graph, ctx, node, operands, found)
    why = refusal.reason if refusal else rule.why
    planned = {u: d for d in ctx.plan.decisions for u in d.uses}
    if all(o.use in planned and planned[o.use].reason == why for o in operands):
        return
    ctx.plan.forget(node.name)
    for operand in operands:
        spec, name = None if refusal else operand.spec, operand.tensor.name
        ctx.plan.decide(Decision(name, "activation", spec, why, (operand.use,)))
        if refusal is None and "probabilities" in found[name].names:
            ctx.ranges.set(name, Range(np.array(0.0), np.array(1.0)))
        elif refusal is None:
            ctx.request(name, operand.spec)


def _operand(graph: Graph, node: Node, index: int, spec: QSpec) -> _Operand:
    chain = movers_before(graph, node.inputs[index])
    if not chain:
        return _Operand(node.inputs[index], spec, Use(node.name, index))
    return _Operand(chain[-1].inputs[0], spec, Use(chain[-1].name, 0))


def _obstacle(
    graph: Graph, ctx: Context, node: Node, operands: list[_Operand], found: Mapping[str, Role]
) -> Refusal | None:
    """Why the product stays float, None where it need not."""
    outs = [t.name for t in node.outputs]
    for operand, moved in zip(operands, node.inputs, strict=True):
        if is_constant(moved) or not is_float(operand.tensor):
            return Refusal("an operand is constant, or not float32")
        names = names_to_match(found, [operand.tensor.name, moved.name, *outs], [node.name])
        kept = ctx.choices.kept_by(names)
        if kept is not None:
            return kept
        own = names_to_match(found, [operand.tensor.name, moved.name], [node.name])
        choice = precision.of_activation(graph, ctx, own, operand.spec)
        if choice.spec != operand.spec:
            return Refusal(choice.reason or "no integers of that width")
    return None
