"""Carries out the plan: quantized weights, and quantizers on activations.

    weight:               W           →   DequantizeLinear(Wq, scale)
    activation, static:   x           →   DequantizeLinear(QuantizeLinear(x, s, z), s, z)
    the same in 7 bits:   x           →   DequantizeLinear(Clip(QuantizeLinear(x, s, z)), s, z)
    activation, dynamic:  x           →   DequantizeLinear(DynamicQuantizeLinear(x))

One pair for each tensor, shared by all its planned uses: Q, K and V read one quantized input.
Refuses an activation without a calibrated range; the operator's weight then stays float too where
the rule needs both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir.graph import Graph, Tensor, array
from qcompile.planning.context import Context, Numerics, Pass, Stage
from qcompile.planning.plan import Decision, Rounded
from qcompile.quant.affine import Array, qparams, quantized_sqnr_db
from qcompile.quant.weight_rounding import nearest


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Insert Q/DQ nodes as planned."""

    name: ClassVar[str] = "insert-qdq"
    stage: ClassVar[Stage] = Stage.INSERT
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, graph: Graph, ctx: Context) -> bool:
        lift_without_range(ctx)
        decisions = [d for d in ctx.plan.quantized() if _is_pending(graph, d)]
        for decision in decisions:
            make = _weight if decision.kind == "weight" else activation
            _redirect(graph, decision, make(graph, ctx, decision))
        return bool(decisions)


def _is_pending(graph: Graph, decision: Decision) -> bool:
    """False once carried out: the uses then read a DequantizeLinear."""
    use = decision.uses[0]
    return bool(graph.find(use.node).inputs[use.index].name == decision.tensor)


def lift_without_range(ctx: Context) -> None:
    """An operator whose data has no range, in mode static, stays float with all its operands."""
    if ctx.choices.mode != "static":
        return
    for decision in list(ctx.plan.quantized("activation")):
        if ctx.ranges.get(decision.tensor) is not None:
            continue
        reason = ctx.ranges.missing.get(decision.tensor, "its range was never asked for")
        concerned = [u.node for u in decision.uses] + [decision.maker] * bool(decision.maker)
        for node in dict.fromkeys(concerned):
            ctx.plan.release(node, reason)
        ctx.skip(decision.tensor, reason)


def integers(ctx: Context, decision: Decision, values: Array) -> Rounded:
    """What a weight becomes: as a pass has rounded it, else to nearest."""
    assert decision.spec is not None  # quantized() yields no other
    return ctx.rounded_as(decision.tensor, decision.spec) or nearest(values, decision.spec)


def _weight(graph: Graph, ctx: Context, decision: Decision) -> Tensor:
    """The dequantized weight."""
    assert decision.spec is not None
    spec = decision.spec
    weight = graph.find(decision.uses[0].node).inputs[decision.uses[0].index]
    values = array(weight)
    rounded = integers(ctx, decision, values)
    params = rounded.params
    noise = quantized_sqnr_db(values, rounded.values, params)
    q = graph.constant(f"{decision.tensor}/{spec.dtype}", rounded.values)
    ctx.origins[q.name] = (decision.tensor, noise)
    scale = graph.constant(f"{decision.tensor}/scale", params.scale)
    # ONNX makes the zero point optional; ONNX Runtime's fusions read it without asking and crash.
    zero = graph.constant(f"{decision.tensor}/zero_point", params.zero_point)
    ctx.origins[scale.name] = ctx.origins[zero.name] = (decision.tensor, None)
    attrs = {} if spec.axis is None else {"axis": spec.axis}
    name = f"{decision.tensor}/dequantized"
    return graph.add("DequantizeLinear", [q, scale, zero], [name], attrs, like=weight).outputs[0]


def activation(graph: Graph, ctx: Context, decision: Decision) -> Tensor:
    """The tensor through its quantizer and back."""
    first = decision.uses[0]
    tensor = graph.find(first.node).inputs[first.index]
    name = decision.tensor
    if ctx.choices.mode == "dynamic":
        outs = [f"{name}/quantized", f"{name}/scale", f"{name}/zero_point"]
        made = graph.add("DynamicQuantizeLinear", [tensor], outs).outputs
        operands, attrs = list(made), dict[str, int]()
    else:
        operands, attrs = _static_quantizer(graph, ctx, decision, tensor)
    node = graph.add("DequantizeLinear", operands, [f"{name}/dequantized"], attrs, like=tensor)
    return node.outputs[0]


def _static_quantizer(
    graph: Graph, ctx: Context, decision: Decision, tensor: Tensor
) -> tuple[list[Tensor], dict[str, int]]:
    """(quantized, scale, zero point) and the attributes of a pair with the calibrated range."""
    span = ctx.ranges.get(decision.tensor)
    assert decision.spec is not None and span is not None  # lifted above otherwise
    params = qparams(span, decision.spec)
    scale = graph.constant(f"{decision.tensor}/scale", params.scale)
    zero = graph.constant(f"{decision.tensor}/zero_point", params.zero_point)
    attrs = {} if decision.spec.axis is None else {"axis": decision.spec.axis}
    name = f"{decision.tensor}/quantized"
    made = graph.add("QuantizeLinear", [tensor, scale, zero], [name], attrs).outputs[0]
    if decision.spec.reduced:  # QuantizeLinear saturates at 8 bits
        bounds = zip(("low", "high"), decision.spec.limits, strict=True)
        ends = [graph.constant(f"{name}/{n}", np.array(v, np.int8)) for n, v in bounds]
        made = graph.add("Clip", [made, *ends], [f"{name}/clipped"], like=made).outputs[0]
    return [made, scale, zero], attrs


def _redirect(graph: Graph, decision: Decision, result: Tensor) -> None:
    for use in decision.uses:
        graph.set_input(graph.find(use.node), use.index, result)
