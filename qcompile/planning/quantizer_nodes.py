"""A decision of the plan as nodes: Q/DQ for an activation, int8 values for a weight."""

from __future__ import annotations

import numpy as np

from qcompile.ir import Graph, Tensor, array
from qcompile.planning.context import Context
from qcompile.planning.plan import Decision
from qcompile.quant import Array, Rounded, qparams
from qcompile.quant.affine import quantized_sqnr_db
from qcompile.quant.bound_cost import weight_cost_db
from qcompile.quant.rounding import nearest


def float_without_range(ctx: Context) -> None:
    """In mode static, keep operators whose data has no range float, with all their operands."""
    if ctx.choices.mode != "static":
        return
    for decision in list(ctx.plan.quantized("activation")):
        if ctx.ranges.get(decision.tensor) is not None:
            continue
        reason = ctx.ranges.missing.get(decision.tensor, "no range was calibrated for it")
        affected = (*(u.node for u in decision.uses), decision.maker)
        for node in dict.fromkeys(n for n in affected if n is not None):
            ctx.plan.release(node, reason)
        ctx.skip(decision.tensor, reason)


def rounded_weight(ctx: Context, decision: Decision, values: Array) -> Rounded:
    """The quantized weight: as a pass has rounded it, else to nearest.

    In the shape of ``decision.quantized_view``.
    """
    assert decision.spec is not None  # quantized() yields no other
    rounded = ctx.rounded_as(decision.tensor, decision.spec)
    return rounded or nearest(decision.quantized_view(values), decision.spec)


def dequantized_weight(graph: Graph, ctx: Context, decision: Decision) -> Tensor:
    """Add a weight's DequantizeLinear; returns its output."""
    assert decision.spec is not None
    spec = decision.spec
    weight = graph.find(decision.uses[0].node).inputs[decision.uses[0].index]
    values = array(weight)
    rounded = rounded_weight(ctx, decision, values)
    params = rounded.params
    noise = quantized_sqnr_db(decision.quantized_view(values), rounded.values, params)
    q = graph.constant(f"{decision.tensor}/{spec.dtype}", rounded.values)
    ctx.origins[q.name] = (decision.tensor, noise)
    ctx.bound_costs[decision.tensor] = weight_cost_db(decision.quantized_view(values), params)
    scale = graph.constant(f"{decision.tensor}/scale", params.scale)
    # ONNX makes the zero point optional, but ONNX Runtime's fusions crash without it.
    zero = graph.constant(f"{decision.tensor}/zero_point", params.zero_point)
    ctx.origins[scale.name] = ctx.origins[zero.name] = (decision.tensor, None)
    attrs = {} if spec.axis is None else {"axis": spec.axis}
    name = f"{decision.tensor}/dequantized"
    node = graph.add("DequantizeLinear", [q, scale, zero], [name], attrs, like=weight)
    real = node.outputs[0]
    if not decision.stacked:
        return real
    real.shape = rounded.values.shape
    shape = graph.constant(f"{decision.tensor}/shape", np.array(values.shape, np.int64))
    return graph.add("Reshape", [real, shape], [f"{decision.tensor}/stacked"], like=weight).outputs[
        0
    ]


def dequantized_activation(graph: Graph, ctx: Context, decision: Decision) -> Tensor:
    """Add a tensor's quantizer and dequantizer; returns the latter's output."""
    first = decision.uses[0]
    tensor = graph.find(first.node).inputs[first.index]
    name = decision.tensor
    if ctx.choices.mode == "dynamic":
        outs = [f"{name}/quantized", f"{name}/scale", f"{name}/zero_point"]
        quantizer = graph.add("DynamicQuantizeLinear", [tensor], outs)
        operands, attrs = list(quantizer.outputs), dict[str, int]()
    else:
        operands, attrs = _static_quantizer(graph, ctx, decision, tensor)
    node = graph.add("DequantizeLinear", operands, [f"{name}/dequantized"], attrs, like=tensor)
    return node.outputs[0]


def _static_quantizer(
    graph: Graph, ctx: Context, decision: Decision, tensor: Tensor
) -> tuple[list[Tensor], dict[str, int]]:
    """(quantized, scale, zero point) and the attributes of a pair with the calibrated range."""
    span = ctx.ranges.get(decision.tensor)
    assert (
        decision.spec is not None and span is not None
    )  # else ``float_without_range`` made it float
    params = qparams(span, decision.spec)
    scale = graph.constant(f"{decision.tensor}/scale", params.scale)
    zero = graph.constant(f"{decision.tensor}/zero_point", params.zero_point)
    attrs = {} if decision.spec.axis is None else {"axis": decision.spec.axis}
    name = f"{decision.tensor}/quantized"
    quantized = graph.add("QuantizeLinear", [tensor, scale, zero], [name], attrs).outputs[0]
    if decision.spec.reduced:  # QuantizeLinear saturates at 8 bits
        bounds = zip(("low", "high"), decision.spec.limits, strict=True)
        ends = [graph.constant(f"{name}/{n}", np.array(v, np.int8)) for n, v in bounds]
        clip = graph.add("Clip", [quantized, *ends], [f"{name}/clipped"], like=quantized)
        quantized = clip.outputs[0]
    return [quantized, scale, zero], attrs
