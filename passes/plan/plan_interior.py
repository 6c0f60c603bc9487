"""Plans the tensors between linears too: residual sums, LayerNorm, softmax, GELU.

For targets that quantize everything, as in the paper (Bondarenko et al. 2021, section 3): each
float tensor on the data path that a ruled operator reads or makes gets one quantizer, right where
it is made, for all its readers. Layout operators share the quantizer of what they move. Left
float, with the reason: divisors, sums with a mask, products whose bias is still to be added, graph
outputs, and in images what a Relu or Clip cuts off next: integers end where it cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import (
    MICROSOFT,
    ONNX,
    Graph,
    Refusal,
    Tensor,
    domain_of,
    is_constant,
    is_layout,
    is_op,
)
from qcompile.ir.analysis.conv_activation import channels_first, result
from qcompile.ir.analysis.data_path import aliases, data_path, is_masking, layout_root
from qcompile.ir.analysis.prequantized import scale_arithmetic
from qcompile.ir.analysis.transformer_roles import names_to_match, roles
from qcompile.ir.quantized_operators import QUANTIZERS
from qcompile.planning import Context, Decision, precision, uses_of
from qcompile.quant import QSpec
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE


@dataclass(frozen=True)
class PlanInterior(Pass):
    """Quantize every activation between the linears, on targets that ask for it."""

    name: ClassVar[str] = "plan-interior"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-operands",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        if not ctx.target.quantize_interior or ctx.choices.mode != "static":
            return False
        if graph.opset < QDQ_SINCE:
            return False  # plan-operands has said so
        path = data_path(graph)
        lifted = {d.tensor: Refusal(d.reason) for d in ctx.plan.decisions if d.spec is None}
        wanted, found = _wanted(graph, ctx, path), roles(graph)
        images, scales = channels_first(graph), scale_arithmetic(graph)
        # One quantizer for each tensor replaces the one for each operand that was planned before.
        ctx.plan.drop_activations()
        ctx.requests.clear()
        for name, (tensor, spec) in sorted(wanted.items()):
            names = names_to_match(found, *aliases(graph, tensor))
            refusal = lifted.get(name) or ctx.choices.kept_by(names)
            refusal = refusal or _obstacle(graph, tensor, path)
            if refusal is None and name in images and result(graph, tensor) is not tensor:
                reason = "the activation behind it cuts it off: what that makes is quantized"
                refusal = Refusal(reason)
            if refusal is None and name in scales:
                refusal = Refusal("a scale of what came in quantized")
            chosen = precision.of_activation(graph, ctx, names, spec)
            kept = None if refusal else chosen.spec
            why = refusal.reason if refusal else chosen.reason or "quantized where it is made"
            ctx.plan.decide(Decision(name, "activation", kept, why, uses_of(tensor)))
            if kept is not None:
                ctx.request(name, kept)
        return False


def _wanted(graph: Graph, ctx: Context, path: set[str]) -> dict[str, tuple[Tensor, QSpec]]:
    """Tensors to quantize, traced back to where their values are made."""
    found: dict[str, tuple[Tensor, QSpec]] = {}
    for node in graph.nodes:
        rule = ctx.target.rule(node.op, ctx.choices.mode)
        if rule is None or domain_of(node) not in (ONNX, MICROSOFT):
            continue
        if rule.activation is not None:
            for tensor in (t for t in node.inputs if t.name in path and not is_constant(t)):
                root = layout_root(graph, tensor)
                found.setdefault(root.name, (root, rule.activation))
        if rule.output is not None and not is_layout(node):
            for tensor in (t for t in node.outputs if t.name in path):
                found.setdefault(tensor.name, (tensor, rule.output))
    return found


def _obstacle(graph: Graph, tensor: Tensor, path: set[str]) -> Refusal | None:
    maker = graph.producer(tensor)
    if maker is not None and is_masking(maker, path):
        return Refusal("a mask is added: its constants would fill the range")
    if maker is not None and is_op(maker, "MatMul") and _awaits_bias(graph, tensor):
        return Refusal("the bias is added first, the sum is quantized")
    if not tensor.outputs:
        return Refusal("graph output")
    if any(is_op(n, "Div") and n.inputs[1] is tensor for n in graph.consumers(tensor)):
        return Refusal(
            "something is divided by it: what is rounded to zero would make that infinite"
        )
    beside = [*graph.consumers(tensor), *([] if maker is None else [maker])]
    if any(is_op(n, *QUANTIZERS) for n in beside):
        return Refusal("it came in quantized")
    if _reaches_subgraph(graph, tensor):
        return Refusal(
            "a subgraph reads it: ONNX Runtime crashes on a quantizer that it moves up to one"
        )
    return None


def _reaches_subgraph(graph: Graph, tensor: Tensor) -> bool:
    """True where a subgraph reads the tensor, or what layout operators make of it."""
    if graph.in_subgraph(tensor):
        return True
    movers = [n for n in graph.consumers(tensor) if is_layout(n)]
    return any(_reaches_subgraph(graph, t) for n in movers for t in n.outputs)


def _awaits_bias(graph: Graph, tensor: Tensor) -> bool:
    add = graph.only_consumer(tensor, "Add")
    return add is not None and any(is_constant(t) for t in add.inputs)
