"""Decides which LSTMs run in int8: both weights together. Edits nothing.

ONNX Runtime has one integer kernel for recurrent layers, DynamicQuantizeLSTM. It quantizes data and
state itself, so no range is calibrated, in mode static either: each step takes the range of the
whole batch. Weights have one scale for each gate and unit of each direction. Refuses weights of
which one is computed, and activations without bounds, with which a state can grow and the steps of
its integers with it. Weights that are refused, and GRU and RNN, are left to ``plan-stored``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, array, is_constant, is_float, is_op, rank
from qcompile.ir.analysis.transformer_roles import names_to_match, roles
from qcompile.ir.recurrent_layers import RECURRENT, WEIGHTS, has_bounded_state
from qcompile.planning import Context, Decision, Use, precision
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE, OpRule

_VECTORS = "biases, initial states and peepholes of recurrent layers stay float"
_DATA = "DynamicQuantizeLSTM quantizes it itself, over the whole batch"


@dataclass(frozen=True)
class PlanRecurrent(Pass):
    """Choose LSTMs to run in int8."""

    name: ClassVar[str] = "plan-recurrent"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-operands",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        rule = ctx.target.rule("LSTM", ctx.choices.mode)
        role_of = roles(graph)
        for node in (n for n in graph.nodes if is_op(n, *RECURRENT)):
            _leave_vectors(ctx, node)
            if is_op(node, "LSTM") and rule is not None and graph.opset >= QDQ_SINCE:
                tensors = [t.name for t in (*node.inputs, *node.outputs) if t.name]
                _plan(graph, ctx, node, rule, names_to_match(role_of, tensors, [node.name]))
        return False


def _leave_vectors(ctx: Context, node: Node) -> None:
    """Record that biases, initial states and peepholes, if constant, stay float."""
    for slot, tensor in enumerate(node.inputs):
        if slot not in (0, *WEIGHTS) and is_constant(tensor) and is_float(tensor):
            uses = (Use(node.name, slot),)
            ctx.plan.decide(Decision(tensor.name, "weight", None, _VECTORS, uses))


def _plan(graph: Graph, ctx: Context, node: Node, rule: OpRule, names: list[str]) -> None:
    assert rule.weight is not None and rule.activation is not None  # as the table has it
    refusal = ctx.choices.kept_by(names)
    weight = precision.of_weight(graph, ctx, names, rule.weight)
    data = precision.of_activation(graph, ctx, names, rule.activation)
    chosen = (Refusal(c.reason) for c in (weight, data) if c.spec is None and c.reason)
    refusal = refusal or next(chosen, None) or _obstacle(node, rule)
    if refusal is not None:
        ctx.skip(node, refusal.reason)
    spec, why = weight.spec, weight.reason or rule.why
    for slot in WEIGHTS:
        tensor, uses = node.inputs[slot], (Use(node.name, slot),)
        if refusal is None:
            ctx.plan.decide(Decision(tensor.name, "weight", spec, why, uses, stacked=2))
        elif is_constant(tensor):
            ctx.plan.decide(Decision(tensor.name, "weight", None, refusal.reason, uses))
    if refusal is not None:
        return
    x = node.inputs[0]
    ctx.plan.decide(Decision(x.name, "activation", None, _DATA, (Use(node.name, 0),)))


def _obstacle(node: Node, rule: OpRule) -> Refusal | None:
    """Why this LSTM cannot run in integers, None where it can."""
    weights = [node.inputs[slot] for slot in WEIGHTS]
    if not all(is_constant(t) and is_float(t) and rank(t) == 3 for t in weights):
        return Refusal("one of its weights is computed, or not float32")
    if not has_bounded_state(node):
        return Refusal("an activation without bounds: its state could outgrow 8 bits")
    if sum(4 * int(np.prod(t.shape, dtype=np.int64)) for t in weights) < rule.min_bytes:
        return Refusal(rule.small)
    refusals = (precision.unusable(array(t)) for t in weights)
    return next((refusal for refusal in refusals if refusal is not None), None)
