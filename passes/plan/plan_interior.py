"""Plans the tensors between linear layers: residual sums, LayerNorm, softmax, GELU.

For targets that quantize everything, as in Bondarenko et al. 2021, section 3: each float tensor on
the data path that an operator with a rule reads or writes gets one quantizer, where it is computed,
for all its readers. Layout operators share the quantizer of their input. Left float, with the
reason: divisors, sums with a mask, matrix multiplications whose bias is still to be added, graph
outputs, probabilities in rows that are too long for 8 bits, and in images tensors that a Relu or
Clip reads next: its result is quantized instead. Also what no data bounds, unless the user's
precision names it: the statistics of normalizations, sums over open dimensions, and scores in rows
of any length.
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
from qcompile.planning.open_sizes import open_sizes
from qcompile.planning.probabilities import probability_rows
from qcompile.planning.row_statistics import row_statistics
from qcompile.quant import QSpec
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import QDQ_SINCE

_STATISTIC = "it scales a whole row: in a normalization in one operator it is float too"


@dataclass(frozen=True)
class PlanInterior(Pass):
    """Quantize every activation between linear layers, on targets that require it."""

    name: ClassVar[str] = "plan-interior"
    stage: ClassVar[Stage] = Stage.PLAN
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("plan-operands",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        if not ctx.target.quantize_interior or ctx.choices.mode != "static":
            return False
        if graph.opset < QDQ_SINCE:
            return False  # plan-operands reports it
        path = data_path(graph)
        left_float = {d.tensor: Refusal(d.reason) for d in ctx.plan.decisions if d.spec is None}
        candidates, role_of = _candidates(graph, ctx, path), roles(graph)
        images, scales = channels_first(graph), scale_arithmetic(graph)
        rows, unbounded = probability_rows(graph), _without_bound(graph)
        # One quantizer per tensor replaces those per operand that plan-operands decided on.
        ctx.plan.drop_activations()
        ctx.requests.clear()
        for name, (tensor, rule_spec) in sorted(candidates.items()):
            names = names_to_match(role_of, *aliases(graph, tensor))
            refusal = left_float.get(name) or ctx.choices.kept_by(names)
            refusal = refusal or _obstacle(graph, tensor, path)
            if refusal is None and name in images and result(graph, tensor) is not tensor:
                refusal = Refusal("the activation after it clips it: that result is quantized")
            if refusal is None and name in scales:
                refusal = Refusal("a scale of a tensor that is already quantized")
            if refusal is None and ctx.choices.precision_of_data(names) is None:
                refusal = unbounded.get(name)
            choice = precision.of_activation(graph, ctx, names, rule_spec, rows.get(name, 0))
            spec = None if refusal else choice.spec
            why = refusal.reason if refusal else choice.reason or "quantized where it is made"
            ctx.plan.decide(Decision(name, "activation", spec, why, uses_of(tensor)))
            if spec is not None:
                ctx.request(name, spec)
        return False


def _without_bound(graph: Graph) -> dict[str, Refusal]:
    """Tensors that data of other sizes takes beyond any calibrated range, unless a user's precision
    says that they become integers."""
    found = open_sizes(graph) | dict.fromkeys(row_statistics(graph), _STATISTIC)
    return {name: Refusal(reason) for name, reason in found.items()}


def _candidates(graph: Graph, ctx: Context, path: set[str]) -> dict[str, tuple[Tensor, QSpec]]:
    """Tensors to quantize and the rules' specs, traced back to where the values are computed."""
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
    """Why a tensor cannot be quantized, None where it can."""
    producer = graph.producer(tensor)
    if producer is not None and is_masking(producer, path):
        return Refusal("a mask is added: its constants would fill the range")
    if producer is not None and is_op(producer, "MatMul") and _awaits_bias(graph, tensor):
        return Refusal("the bias is added first, the sum is quantized")
    if not tensor.outputs:
        return Refusal("graph output")
    if any(is_op(n, "Div") and n.inputs[1] is tensor for n in graph.consumers(tensor)):
        return Refusal("it is a divisor: a value rounded to zero would give infinity")
    neighbours = [*graph.consumers(tensor), *([] if producer is None else [producer])]
    if any(is_op(n, *QUANTIZERS) for n in neighbours):
        return Refusal("it is already quantized in the input model")
    if _read_by_subgraph(graph, tensor):
        return Refusal(
            "a subgraph reads it: ONNX Runtime crashes when it moves a quantizer up to a subgraph"
        )
    return None


def _read_by_subgraph(graph: Graph, tensor: Tensor) -> bool:
    """True where a subgraph reads the tensor, directly or through layout operators."""
    if graph.in_subgraph(tensor):
        return True
    movers = [n for n in graph.consumers(tensor) if is_layout(n)]
    return any(_read_by_subgraph(graph, t) for n in movers for t in n.outputs)


def _awaits_bias(graph: Graph, tensor: Tensor) -> bool:
    add = graph.only_consumer(tensor, "Add")
    return add is not None and any(is_constant(t) for t in add.inputs)
