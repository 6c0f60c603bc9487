"""Decides which convolutions run in int8: data, weight and result. Edits nothing.

An int8 convolution writes int8 results, so its result needs a range as well as its data: that of
the Relu or Clip after it, which becomes part of the quantizer (``conv_activation.py``). Data,
weight and result are quantized together or not at all, except on targets that quantize every tensor
anyway. Operators of a target's ``chained`` rules (residual sums, Concat, MaxPool) are quantized
where everything that they read is quantized by this pass.

Refuses, with the reason: weights that are computed, results that are graph outputs (nothing would
read the int8 values), and convolutions that the target's rule says are no faster, unless their data
is int8 already: a float convolution would dequantize it and quantize its result again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_float, is_op, rank
from qcompile.ir.analysis import conv_activation, prequantized
from qcompile.ir.analysis.transformer_roles import Role, names_to_match, roles
from qcompile.planning import Context, Decision, Kind, PrecisionChoice, Use, precision, uses_of
from qcompile.planning.probabilities import probability_rows
from qcompile.quant import QSpec
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE, OpRule


@dataclass(frozen=True)
class PlanConvolutions(Pass):
    """Choose data, weights and results of convolutions to quantize."""

    name: ClassVar[str] = "plan-convolutions"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-operands",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        rule = ctx.target.rule("Conv", ctx.choices.mode)
        if rule is None or graph.opset < QDQ_SINCE:
            return False  # plan-operands reports it
        chained = {r.op: r for r in ctx.target.chained if ctx.choices.mode in r.modes}
        planner = _Planner(graph, ctx, roles(graph), probability_rows(graph))
        for node in graph.nodes:
            if is_op(node, "Conv"):
                planner.convolution(node, rule)
            elif is_op(node, *chained):
                planner.chained(node, chained[node.op])
        return False


@dataclass
class _Planner:
    """``quantized``: tensors that are quantized where they are computed, for all readers."""

    graph: Graph
    ctx: Context
    roles: Mapping[str, Role]
    rows: Mapping[str, float]
    quantized: set[str] = field(default_factory=set)

    def convolution(self, node: Node, rule: OpRule) -> None:
        """Plan one convolution; record the reason where it stays float."""
        data, weight = node.inputs[:2]
        result = conv_activation.result(self.graph, node.outputs[0])
        whole = rule.output is not None and not self.ctx.target.quantize_interior
        refusal = self._obstacle(node, rule) or (self._visible(node, result) if whole else None)
        matrix = self._weight(node, rule.weight)
        row = self._activation(node, [data], rule.activation)
        if prequantized.has_quantizer(self.graph, data):
            row = PrecisionChoice(None)
        out = PrecisionChoice(None)
        if whole and not prequantized.is_quantized_next(self.graph, result):
            out = self._activation(node, [result, node.outputs[0]], rule.output)
        if not self.ctx.target.quantize_interior:
            linked = (matrix, row, out) if whole else (matrix, row)
            missing = (Refusal(c.reason) for c in linked if c.spec is None and c.reason)
            refusal = refusal or next(missing, None)
        if refusal is not None:
            self.ctx.skip(node, refusal.reason)
            matrix = row = out = PrecisionChoice(None, refusal.reason)
        if is_constant(weight):
            self._decide(weight, "weight", matrix, rule, (Use(node.name, 1),))
        if rule.activation is not None:
            self._decide(data, "activation", row, rule, (Use(node.name, 0),))
        if out.spec is not None:
            self._result(node, result, out, rule)

    def chained(self, node: Node, rule: OpRule) -> None:
        """Plan an operator whose operands are all quantized by this pass; leave any other alone."""
        operands = [t for t in node.inputs if t.name]
        if not all(t.name in self.quantized for t in operands) or any(
            t.name for t in node.outputs[1:]
        ):
            return
        result = (
            conv_activation.result(self.graph, node.outputs[0])
            if is_op(node, "Add")
            else node.outputs[0]
        )
        out = self._activation(node, [result, node.outputs[0]], rule.output)
        names = names_to_match(self.roles, [result.name], [node.name])
        if self._visible(node, result) is None and not self.ctx.choices.kept_by(names) and out.spec:
            self._result(node, result, out, rule)

    def _result(self, node: Node, result: Tensor, choice: PrecisionChoice, rule: OpRule) -> None:
        """Quantize a result for all its readers; ``node`` runs in int8 only with this decision."""
        self.ctx.plan.claim(uses_of(result))  # replaces an earlier decision for float
        self._decide(result, "activation", choice, rule, uses_of(result), node.name)
        self.quantized.add(result.name)

    def _decide(
        self,
        tensor: Tensor,
        kind: Kind,
        choice: PrecisionChoice,
        rule: OpRule,
        uses: tuple[Use, ...],
        maker: str | None = None,
    ) -> None:
        unplanned = prequantized.has_quantizer(self.graph, tensor)
        brought = kind == "activation" and unplanned
        why = choice.reason or (prequantized.BROUGHT if brought else rule.why)
        self.ctx.plan.decide(Decision(tensor.name, kind, choice.spec, why, uses, maker))
        if kind == "activation" and choice.spec is not None and self.ctx.choices.mode == "static":
            self.ctx.request(tensor.name, choice.spec)

    def _weight(self, node: Node, spec: QSpec | None) -> PrecisionChoice:
        if spec is None:
            return PrecisionChoice(None)
        names = names_to_match(self.roles, [node.inputs[1].name], [node.name])
        if _is_depthwise(node):  # its kernel in ONNX Runtime never accumulates in int16
            spec = replace(spec, paired=False)
        return precision.of_weight(self.graph, self.ctx, names, spec)

    def _activation(self, node: Node, tensors: list[Tensor], spec: QSpec | None) -> PrecisionChoice:
        if spec is None:
            return PrecisionChoice(None)
        names = names_to_match(self.roles, [t.name for t in tensors], [node.name])
        row = self.rows.get(tensors[0].name, 0)
        return precision.of_activation(self.graph, self.ctx, names, spec, row)

    def _visible(self, node: Node, result: Tensor) -> Refusal | None:
        """Why a result cannot be quantized, None where it can."""
        if any(self.graph.is_output(t) for t in (result, node.outputs[0])):
            return Refusal(
                "its result is a graph output, or read by a subgraph: it has to be float"
            )
        return None if result.outputs else Refusal("nothing reads its result")

    def _obstacle(self, node: Node, rule: OpRule) -> Refusal | None:
        """Why a convolution cannot run in int8, or is no faster; None where neither is true."""
        data, weight = node.inputs[:2]
        names = (weight.name, data.name, *(t.name for t in node.outputs))
        kept = self.ctx.choices.kept_by(names_to_match(self.roles, names, [node.name]))
        if kept is not None:
            return kept
        if prequantized.is_quantized_weight(self.graph, weight):
            return Refusal(prequantized.IN_INPUT)
        if not (is_constant(weight) and is_float(weight) and (rank(weight) or 0) >= 3):
            return Refusal("the weight is not a float32 constant of rank 3 or more")
        if is_constant(data) or not is_float(data):
            return Refusal("the data operand is constant, or not float32")
        if any(t.name and not is_constant(t) for t in node.inputs[2:]):
            return Refusal("the bias is computed")
        values = array(weight)
        if values.size == 0 or not np.isfinite(values).all():
            return Refusal("the weight is empty, or holds NaN or infinity")
        # few products per sum: grouped, or a small kernel with few input channels
        few = node.attrs.get("group", 1) != 1 or values[0].size < rule.min_summed
        slower = rule.min_summed and few and data.name not in self.quantized
        return Refusal(rule.small) if slower else None


def _is_depthwise(node: Node) -> bool:
    shape = tuple(node.inputs[1].shape or ())
    return shape[:2] == (node.attrs.get("group", 1), 1)
