"""Lets operators that stay float read a weight as it is quantized for others.

    MatMul(x, W), Gather(W, i)            →   both read DequantizeLinear(Wq)
    MatMul(x, W), Gather(T, i), T = W.T   →   MatMul(x, W), Gather(Transpose(W), i), likewise

Otherwise the file would hold the weight twice, as integers and as floats: a convolution or a layer
whose result has no range, or an embedding that is tied to the output layer. Rows of an embedding
are then looked up as integers (``lower-embeddings``). Edits the plan, and the graph only where the
table is the transposed weight. Refuses readers for which the target has no rule, or that the user
wants float, and weights that an If, Loop or Scan reads by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Constant, Graph, Node, Refusal, array, is_constant, is_op, op_name
from qcompile.ir.equal_constants import EqualConstants, is_weight
from qcompile.planning import Context, Decision, Use, uses_of
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class ShareWeights(Pass):
    """Store a weight that is quantized for some of its readers only as integers."""

    name: ClassVar[str] = "share-weights"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = (
        "migrate-scales", "permute-channels", "split-groups", "split-outliers",
    )  # fmt: skip

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = _read_transposed(graph, ctx)
        for decision, weight in _quantized_weights(graph, ctx):
            taken = {u for d in ctx.plan.quantized("weight") for u in d.uses}
            others = tuple(u for u in uses_of(weight) if u not in taken)
            refusal = _obstacle(graph, ctx, weight, others)
            if others and refusal is not None:
                ctx.skip(weight.name, refusal.reason)
            elif others:
                ctx.plan.claim(others)
                ctx.plan.replace(decision, uses=(*decision.uses, *others))
        return changed


def _quantized_weights(graph: Graph, ctx: Context) -> Iterator[tuple[Decision, Constant]]:
    """Each constant that is a weight of some size, with the first decision to quantize it."""
    constants = graph.constants()
    first: dict[str, Decision] = {}
    for decision in ctx.plan.quantized("weight"):
        first.setdefault(decision.tensor, decision)
    for name, decision in first.items():
        weight = constants.get(name)
        if weight is not None and is_weight(tuple(weight.shape), array(weight).nbytes):
            yield decision, weight


def _obstacle(
    graph: Graph, ctx: Context, weight: Constant, others: tuple[Use, ...]
) -> Refusal | None:
    if graph.is_output(weight):
        return Refusal("a subgraph reads it as it is: it is stored as floats too")
    readers = (r for use in others for r in _readers(graph, graph.find(use.node)))
    reason = next((why for r in readers if (why := _why_float(ctx, weight, r)) is not None), None)
    return None if reason is None else Refusal(f"{reason}: it is stored as floats too")


def _readers(graph: Graph, node: Node) -> list[Node]:
    """The node, or those behind a Transpose."""
    return graph.consumers(node.outputs[0]) if is_op(node, "Transpose") else [node]


def _why_float(ctx: Context, weight: Constant, node: Node) -> str | None:
    """Why a reader must read floats, None where it may read dequantized integers."""
    names = (weight.name, node.name, *(t.name for t in node.outputs))
    kept = ctx.choices.kept_by(names)
    if kept is not None:
        return f"{node.name!r} is {kept.reason}"
    rule = ctx.choices.precision_of(names)
    if rule is not None and rule.precision == "float":
        return f"{node.name!r} is kept float by precision pattern {rule.pattern!r}"
    if ctx.target.rule(op_name(node), ctx.choices.mode) is None:
        return f"target {ctx.target.name!r} has no rule for {op_name(node)} {node.name!r}"
    return None


def _read_transposed(graph: Graph, ctx: Context) -> bool:
    """Let lookups in a table that is a quantized weight, transposed, read that; True where any."""
    if ctx.target.rule("Gather", ctx.choices.mode) is None:
        return False
    tables = {
        t.name: t
        for node in graph.nodes
        if is_op(node, "Gather") and is_constant(t := node.inputs[0]) and len(t.shape) == 2
    }
    quantized = {d.tensor for d in ctx.plan.quantized("weight")}
    weights = EqualConstants()
    shapes = {tuple(t.shape)[::-1] for t in tables.values()}
    for _, weight in _quantized_weights(graph, ctx):
        if tuple(weight.shape) in shapes:
            weights.add(weight)
    changed = False
    for table in tables.values():
        lookups = all(is_op(n, "Gather") for n in graph.consumers(table))
        free = table.name not in quantized and lookups and not graph.is_output(table)
        weight = weights.find(array(table).T) if free else None
        if weight is not None and _obstacle(graph, ctx, table, uses_of(table)) is None:
            ctx.plan.claim(uses_of(table))
            graph.substitute(table, "Transpose", [weight], "transposed", {"perm": [1, 0]})
            changed = True
    return changed
