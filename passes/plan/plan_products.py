"""Plans attention's matrix multiplications in int8: query with key, probabilities with value.

Both operands are activations, so both get a quantizer: uint8 on the left, and on the right the type
that the target's kernels need. The recipe's ``attention`` selects the matrix multiplications: the
scores lose almost no accuracy and gain most speed; the context (probabilities with value) loses a
little more, and much in rows of some hundred tokens, so no target asks for it: a recipe has to.
Probabilities are in [0, 1] for any data, so their range is not calibrated. The other ranges are
requested where the values are computed, before layout operators split them into heads: rows of
padding can be excluded there. One operand that stays float keeps the other float.
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
_KINDS_OF_OPTION = {"scores": ("scores",), "all": ("scores", "context")}


@dataclass(frozen=True)
class _Operand:
    """One operand: the tensor before layout operators move it, and the use of that tensor."""

    tensor: Tensor
    spec: QSpec
    use: Use


@dataclass(frozen=True)
class PlanProducts(Pass):
    """Choose matrix multiplications of attention to run in int8."""

    name: ClassVar[str] = "plan-products"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-operands",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        kinds = _KINDS_OF_OPTION.get(ctx.choices.attention, ())
        if ctx.choices.mode != "static" or not kinds:
            return False
        if graph.opset < QDQ_SINCE:
            return False  # plan-operands reports it
        if ctx.target.product is None:
            reason = "cannot multiply two activations in int8"
            ctx.skip(graph.name, f"target {ctx.target.name!r} {reason}")
            return False
        role_of = roles(graph)
        for node in graph.nodes:
            if is_op(node, "MatMul") and _kind(node, role_of) in kinds:
                _plan(graph, ctx, node, role_of)
        return False


def _kind(node: Node, role_of: Mapping[str, Role]) -> str | None:
    """``scores`` or ``context``, None for any other matrix multiplication."""
    names = [role_of[t.name].names if t.name in role_of else () for t in node.inputs]
    for kind, (left, right) in _OPERANDS.items():
        if left in names[0] and right in names[1]:
            return kind
    return None


def _plan(graph: Graph, ctx: Context, node: Node, role_of: Mapping[str, Role]) -> None:
    """Decide on both operands of one matrix multiplication, unless that was done before."""
    rule = ctx.target.product
    assert rule is not None and rule.activation is not None and rule.right is not None
    operands = [_operand(graph, node, i, s) for i, s in enumerate((rule.activation, rule.right))]
    refusal = _obstacle(graph, ctx, node, operands, role_of)
    why = refusal.reason if refusal else rule.why
    planned = {u: d for d in ctx.plan.decisions for u in d.uses}
    if all(o.use in planned and planned[o.use].reason == why for o in operands):
        return
    ctx.plan.forget(node.name)
    for operand in operands:
        spec, name = None if refusal else operand.spec, operand.tensor.name
        ctx.plan.decide(Decision(name, "activation", spec, why, (operand.use,)))
        if refusal is None and "probabilities" in role_of[name].names:
            ctx.ranges.set(name, Range(np.array(0.0), np.array(1.0)))
        elif refusal is None:
            ctx.request(name, operand.spec)


def _operand(graph: Graph, node: Node, index: int, spec: QSpec) -> _Operand:
    chain = movers_before(graph, node.inputs[index])
    if not chain:
        return _Operand(node.inputs[index], spec, Use(node.name, index))
    return _Operand(chain[-1].inputs[0], spec, Use(chain[-1].name, 0))


def _obstacle(
    graph: Graph, ctx: Context, node: Node, operands: list[_Operand], role_of: Mapping[str, Role]
) -> Refusal | None:
    """Why the matrix multiplication stays float, None where it can run in int8."""
    outs = [t.name for t in node.outputs]
    for operand, moved in zip(operands, node.inputs, strict=True):
        if is_constant(moved) or not is_float(operand.tensor):
            return Refusal("an operand is constant, or not float32")
        names = names_to_match(role_of, [operand.tensor.name, moved.name, *outs], [node.name])
        kept_float = ctx.choices.kept_by(names)
        if kept_float is not None:
            return kept_float
        own = names_to_match(role_of, [operand.tensor.name, moved.name], [node.name])
        choice = precision.of_activation(graph, ctx, own, operand.spec)
        if choice.spec != operand.spec:
            return Refusal(choice.reason or "its precision rule gives it another type")
    return None
