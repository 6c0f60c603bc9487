"""Decides, operator by operator, which operands are quantized. Edits nothing.

For each operator that the target has a rule for, the constant operand gets a weight decision and
the data operand an activation decision; static mode requests its range. Every operand that could
have been quantized and is not gets a decision too, with the reason that it stays float. Where the
target needs all operands of an operator quantized, one float operand keeps the other float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from qcompile.errors import RecipeError
from qcompile.ir import (
    Graph,
    Node,
    Refusal,
    array,
    has_subgraph,
    is_constant,
    is_float,
    is_op,
    is_plain_gemm,
    op_name,
    rank,
)
from qcompile.ir.analysis import prequantized
from qcompile.ir.analysis.data_path import aliases, layout_root
from qcompile.ir.analysis.name_patterns import is_role, matches
from qcompile.ir.analysis.transformer_roles import Role, names_to_match, roles
from qcompile.planning import Context, Decision, Kind, PrecisionChoice, Use, precision
from qcompile.planning.context import WeightKind
from qcompile.planning.probabilities import probability_rows
from qcompile.quant import QSpec
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE, OpRule

_KIND_NAMES: dict[WeightKind, str] = {"linear": "linear layer's weight", "table": "table"}
_OTHER_PASSES = ("Conv", "LSTM")  # operators that other passes plan, where the target has a rule


@dataclass(frozen=True)
class PlanOperands(Pass):
    """Choose weights and operator inputs to quantize by the target's table."""

    name: ClassVar[str] = "plan-operands"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        role_of, rows = roles(graph), probability_rows(graph)
        _check_patterns(graph, ctx, role_of)
        if graph.opset < QDQ_SINCE:
            ctx.skip(graph.name, f"opset {graph.opset} has no per-channel Q/DQ, needs {QDQ_SINCE}")
            return False
        for node in graph.nodes:
            rule = ctx.target.rule(op_name(node), ctx.choices.mode)
            if rule is not None and node.op in _OTHER_PASSES:
                continue
            has_weight = rule is not None and rule.weight is not None
            if rule is not None and has_weight and _weight_slot(node) is not None:
                _plan(graph, ctx, node, rule, role_of, rows)
            elif has_weight and _is_prequantized(graph, node):
                ctx.skip(node, prequantized.IN_INPUT)
            elif rule is None or has_weight:
                _leave(ctx, node, ctx.target.float_ops.get(op_name(node)))
        _note_unused_bits(graph, ctx)
        return False


def _is_prequantized(graph: Graph, node: Node) -> bool:
    return any(prequantized.is_quantized_weight(graph, t) for t in node.inputs[:2])


def _plan(
    graph: Graph,
    ctx: Context,
    node: Node,
    rule: OpRule,
    role_of: Mapping[str, Role],
    rows: Mapping[str, float],
) -> None:
    """Decide on the weight and the data of one operator."""
    slot = _weight_slot(node) or 0
    weight, data = node.inputs[slot], node.inputs[1 - slot]
    matrix, row = _choices(graph, ctx, node, rule, role_of, rows)
    refusal = _obstacle(ctx, node, rule, slot, role_of)
    if refusal is None and not ctx.target.quantize_interior:
        reasons = (c.reason for c in (matrix, row) if c.spec is None and c.reason)
        refusal = next(map(Refusal, reasons), None)
    if refusal is not None:
        ctx.skip(node, refusal.reason)
        matrix = row = PrecisionChoice(None, refusal.reason)
    why = matrix.reason or rule.why
    ctx.plan.decide(Decision(weight.name, "weight", matrix.spec, why, (Use(node.name, slot),)))
    if rule.activation is None and (ctx.choices.mode != "weight-only" or not is_float(data)):
        return
    brought = prequantized.has_quantizer(graph, data)
    unplanned = prequantized.BROUGHT if brought else "only weights are quantized in this mode"
    why = row.reason or (rule.why if row.spec else unplanned)
    ctx.plan.decide(Decision(data.name, "activation", row.spec, why, (Use(node.name, 1 - slot),)))
    if row.spec is not None and ctx.choices.mode == "static":
        ctx.request(data.name, row.spec)


def _choices(
    graph: Graph,
    ctx: Context,
    node: Node,
    rule: OpRule,
    role_of: Mapping[str, Role],
    rows: Mapping[str, float],
) -> tuple[PrecisionChoice, PrecisionChoice]:
    """Types of the weight and the data, by the rule and the user's precision."""
    slot = _weight_slot(node) or 0
    weight, data = node.inputs[slot], node.inputs[1 - slot]
    spec, matrix, row = _weight_spec(node, rule), PrecisionChoice(None), PrecisionChoice(None)
    if spec is not None:
        names = names_to_match(role_of, [weight.name], [node.name])
        matrix = precision.of_weight(graph, ctx, names, spec, _kind(node))
    if rule.activation is not None:
        named = [data.name], [node.name]
        if ctx.target.quantize_interior:  # as plan-interior will decide, for all readers
            named = aliases(graph, layout_root(graph, data))
        names = names_to_match(role_of, *named)
        length = rows.get(data.name, 0)
        row = precision.of_activation(graph, ctx, names, rule.activation, length)
    if row.spec is not None and prequantized.has_quantizer(graph, data):
        row = PrecisionChoice(None)
    if row.spec is not None and row.spec.dtype != "uint8" and matrix.spec is not None:
        # Only kernels for uint8 data accumulate pairs in int16.
        matrix = replace(matrix, spec=replace(matrix.spec, paired=False))
    return matrix, row


def _leave(ctx: Context, node: Node, reason: str | None) -> None:
    """Record why the operands of an operator stay float that the target computes in float."""
    if reason is None:
        return
    for i, tensor in enumerate(node.inputs):
        kind: Kind = "weight" if is_constant(tensor) else "activation"
        if tensor.name and is_float(tensor) and (kind == "activation" or (rank(tensor) or 0) > 1):
            ctx.plan.decide(Decision(tensor.name, kind, None, reason, (Use(node.name, i),)))


def _weight_slot(node: Node) -> int | None:
    """Which of the first two operands is a float matrix; None where neither or both are."""
    slots = [
        i
        for i, t in enumerate(node.inputs[:2])
        if is_constant(t) and is_float(t) and (rank(t) or 0) >= 2
    ]
    return slots[0] if len(slots) == 1 and len(node.inputs) >= 2 else None


def _weight_spec(node: Node, rule: OpRule) -> QSpec | None:
    """The rule's spec with the axis of this node's output channels."""
    spec = rule.weight
    if spec is not None and spec.axis is not None and node.attrs.get("transB"):
        return replace(spec, axis=1 - spec.axis)
    return spec


def _kind(node: Node) -> WeightKind:
    return "table" if node.op == "Gather" else "linear"


def _obstacle(
    ctx: Context, node: Node, rule: OpRule, slot: int, role_of: Mapping[str, Role]
) -> Refusal | None:
    """Why this operator cannot be quantized, None where it can."""
    weight, data = node.inputs[slot], node.inputs[1 - slot]
    expected = 0 if node.op == "Gather" else 1
    tensors = (weight.name, data.name, *(t.name for t in node.outputs))
    kept_float = ctx.choices.kept_by(names_to_match(role_of, tensors, [node.name]))
    if kept_float is not None:
        return kept_float
    if slot != expected:
        return Refusal("the weight is the left operand")
    if rank(weight) != 2:
        return Refusal(f"the weight has rank {rank(weight)}, a matrix is expected")
    if node.op == "Gather" and node.attrs.get("axis", 0) != 0:
        return Refusal("the lookup is not along the rows of the table")
    if node.op != "Gather" and not is_float(data):
        return Refusal("the data operand is not float32")
    if node.op == "Gemm" and not is_plain_gemm(node):
        return Refusal("Gemm with transA, alpha or beta")
    size = int(np.prod(weight.shape, dtype=np.int64)) * 4
    names = names_to_match(role_of, [weight.name], [node.name])
    small = _too_small(ctx, rule, names, _kind(node), size)
    if small is not None:
        return small
    values = array(weight)
    if size and not values.any():
        return Refusal("all values of the weight are zero")
    return precision.unusable(values)


def _too_small(
    ctx: Context, rule: OpRule, names: list[str], kind: WeightKind, size: int
) -> Refusal | None:
    """That a weight of so many bytes is not worth it; a recipe that asks for its bits wants a small
    file in the first place."""
    asked = ctx.choices.precision_of_weight(names, kind)
    if size >= rule.min_bytes:
        return None
    if asked is None or not (asked.setting or asked.has_few_bits):
        return Refusal(rule.small)
    if size >= rule.min_bytes_asked:
        return None
    return Refusal(f"{kind} under {rule.min_bytes_asked} bytes: not worth the additional nodes")


def _note_unused_bits(graph: Graph, ctx: Context) -> None:
    """Say where a setting for all weights of a kind changed none: it was asked for in vain."""
    if ctx.body_of or any(has_subgraph(node) for node in graph.nodes):
        return  # weights of bodies are planned later
    for kind, what in _KIND_NAMES.items():
        setting, bits = ctx.choices.bits_of(kind)
        found = [
            d for d in ctx.plan.decisions if d.kind == "weight" and _use(graph, ctx, d) == kind
        ]
        if bits is None or any(d.spec is not None and d.spec.bits == bits for d in found):
            continue
        reasons = Counter(d.reason for d in found).most_common(1)
        why = f"target {ctx.target.name!r} finds none to quantize in mode {ctx.choices.mode}"
        ctx.remarks[f"{setting.replace('_', '-')}-unused"] = (
            f"{setting} {bits} applies to no {what}: {reasons[0][0] if reasons else why}"
        )


def _use(graph: Graph, ctx: Context, decision: Decision) -> WeightKind | None:
    """What a weight is for, None where the target does not quantize it for that."""
    node = graph.find(decision.uses[0].node)
    rule = ctx.target.rule(op_name(node), ctx.choices.mode)
    return _kind(node) if rule and is_op(node, "Gather", "Gemm", "MatMul") else None


def _check_patterns(graph: Graph, ctx: Context, role_of: Mapping[str, Role]) -> None:
    """Raises RecipeError for a pattern that matches nothing: it is a mistake."""
    if ctx.body_of:
        return  # checked for the whole model
    nodes = ctx.original_names.union(n.name for n in graph.nodes)
    names = names_to_match(role_of, graph.tensors(), nodes)
    patterns = [("--keep-float", p) for p in ctx.choices.keep_float]
    patterns += [("precision pattern", rule.pattern) for rule in ctx.choices.precision]
    for where, pattern in patterns:
        if matches(pattern, names):
            continue
        if not is_role(pattern):
            raise RecipeError(f"{where} {pattern!r} matches no node and no tensor")
        present = ", ".join(sorted({n for role in role_of.values() for n in role.names})) or "none"
        raise RecipeError(f"{where} {pattern!r} matches no role, this model has: {present}")
