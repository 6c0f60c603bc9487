"""Lets a lookup and a layer read one weight of few bits where the model has one for both.

    MatMul(x, W), Gather(T, i), T = W.T   →   MatMul(x, W), Gather(Transpose(W), i)

A masked language model looks tokens up in the weight of its output layer. The plan gives a table
and a weight bits, blocks and integers of their own, so the file would hold both. Here they get one
decision, with the larger number of bits of the two: the layer's rounding, whose axis with a scale
for each index is the same one. Goes before transforms, which leave shared weights alone. Leaves
pairs of 8 bits, and those for a target that cannot look rows up in a layer's weight. Refuses tables
that other operators or a subgraph read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from qcompile.ir import Constant, Graph, Refusal, array, is_op, op_name
from qcompile.ir.equal_constants import EqualConstants
from qcompile.planning import Context, Decision
from qcompile.quant import QSpec
from qcompile.rewriting import Numerics, Pass, Stage

_NOTE = "tied-table-bits"
_LAYERS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class TieTables(Pass):
    """Give a table and the layer's weight that has its values one decision."""

    name: ClassVar[str] = "tie-tables"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for table, layer in _pairs(graph, ctx):
            refusal = _obstacle(graph, graph.constants()[table.tensor], layer)
            if refusal is not None:
                ctx.skip(table.tensor, refusal.reason)
                continue
            changed |= _tie(graph, ctx, table, layer)
        return changed


def _pairs(graph: Graph, ctx: Context) -> Iterator[tuple[Decision, Decision]]:
    """Decisions for a table and for a weight with its values, at least one with few bits.

    Each is read from the plan when it is its turn, since a pair changes the plan.
    """
    if not ctx.target.ties_tables or not any(map(_width, ctx.plan.quantized("weight"))):
        return
    weights, constants = EqualConstants(), graph.constants()
    for decision in _decisions(graph, ctx, *_LAYERS):
        weights.add(constants[decision.tensor])
    for table in _decisions(graph, ctx, "Gather"):
        values = constants[table.tensor]
        for constant in (values, weights.find(array(values).T)):
            layer = None if constant is None else _layer(graph, ctx, constant, values)
            if layer is not None and (_width(table) or _width(layer)):
                yield table, layer
                break


def _decisions(graph: Graph, ctx: Context, *ops: str) -> list[Decision]:
    """Decisions to quantize matrices to int8 by channel that only these operators read."""
    found, constants = [], graph.constants()
    for decision in ctx.plan.quantized("weight"):
        constant, spec = constants.get(decision.tensor), decision.spec
        is_read = all(is_op(graph.find(use.node), *ops) for use in decision.uses)
        plain = spec is not None and spec.dtype == "int8" and spec.granularity == "channel"
        if constant is not None and is_read and plain and len(constant.shape) == 2:
            found.append(decision)
    return found


def _layer(graph: Graph, ctx: Context, weight: Constant, table: Constant) -> Decision | None:
    """The decision for a layer's weight whose output channels are the rows of a table."""
    axis = 0 if weight is table else 1
    layers = (d for d in _decisions(graph, ctx, *_LAYERS) if d.tensor == weight.name)
    return next((d for d in layers if d.spec is not None and d.spec.axis == axis), None)


def _width(decision: Decision) -> int | None:
    return None if decision.spec is None else decision.spec.width


def _obstacle(graph: Graph, table: Constant, layer: Decision) -> Refusal | None:
    if graph.is_output(table) or graph.is_output(graph.constants()[layer.tensor]):
        return Refusal("a subgraph reads the table or its layer's weight: both are stored")
    others = [n.name for n in graph.consumers(table) if not is_op(n, "Gather")]
    if layer.tensor != table.name and others:
        return Refusal(
            f"{others[0]!r} reads the table too: it is stored in addition to its layer's weight"
        )
    return None


def _tie(graph: Graph, ctx: Context, table: Decision, layer: Decision) -> bool:
    """Join the decisions; True where the graph had to be edited for that."""
    wider = max(layer, table, key=_bits)  # the layer where they are equal
    if _bits(table) != _bits(layer):
        ctx.remarks[_NOTE] = _joined(ctx.remarks.get(_NOTE), table, layer)
    spec, reason = layer.spec, layer.reason
    if wider is table:
        spec = _spec_of_table(graph, ctx, table, layer)
        reason = f"as many bits as the table with its values: {table.reason}"
    for use in table.uses:
        ctx.plan.forget(use.node)
    is_one = table.tensor == layer.tensor
    uses = (*layer.uses, *table.uses) if is_one else layer.uses
    ctx.plan.replace(layer, spec=spec, reason=reason, uses=uses)
    if not is_one:  # share-weights lets the Transpose read the integers
        constants = graph.constants()
        weight, values = constants[layer.tensor], constants[table.tensor]
        graph.substitute(values, "Transpose", [weight], "transposed", {"perm": [1, 0]})
    return not is_one


def _bits(decision: Decision) -> int:
    return 0 if decision.spec is None else decision.spec.bits


def _spec_of_table(graph: Graph, ctx: Context, table: Decision, layer: Decision) -> QSpec | None:
    """The layer's spec with the bits and blocks of the table."""
    assert table.spec is not None and layer.spec is not None  # both are quantized
    if table.spec.width is not None:
        return replace(layer.spec, width=table.spec.width, block=table.spec.block)
    rule = ctx.target.rule(op_name(graph.find(layer.uses[0].node)), ctx.choices.mode)
    own = None if rule is None else rule.weight
    return None if own is None else replace(own, axis=layer.spec.axis)


def _joined(before: str | None, table: Decision, layer: Decision) -> str:
    found = (
        f"{table.tensor!r} is looked up in and is the weight of {layer.uses[0].node!r}: stored "
        f"once, in {max(_bits(table), _bits(layer))} bits, the more of {_bits(table)} for tables "
        f"and {_bits(layer)} for layers"
    )
    return found if before is None else f"{before}; {found}"
