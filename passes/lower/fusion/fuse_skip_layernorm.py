"""Fuses a residual sum and the normalization after it into one operator.

    LayerNormalization(x + b + y, γ, β)   →   SkipLayerNormalization(x, y, γ, β, b)

One kernel instead of up to three, which would write and read the data again. b is the constant bias
of the linear layer before, where that sum has no other reader. Where the residual sum has other
readers (normalization before the block), it becomes the operator's fourth output. Refuses sums that
broadcast, or whose shapes are not known to be equal, and parameters that are not constant vectors.
On CPU the operator is slow: see ``unfuse-skip-layernorm``. Source: ONNX Runtime
com.microsoft.SkipLayerNormalization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import (
    MICROSOFT,
    Graph,
    Node,
    Refusal,
    Tensor,
    is_constant,
    is_float,
    is_op,
    shape_of,
)
from qcompile.ir.analysis.token_axes import Axes, by_position, find_token_axes
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class FuseSkipLayerNorm(Pass):
    """Fuse residual sums with the normalization that reads them."""

    name: ClassVar[str] = "fuse-skip-layernorm"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("fuse-attention",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        token_axes = find_token_axes(graph)
        changed = False
        for node in graph.nodes:
            norm = is_op(node, "LayerNormalization")
            total = graph.producer(node.inputs[0], "Add") if norm else None
            if total is None or any(map(is_constant, total.inputs)):
                continue
            refusal = _obstacle(node, total, token_axes)
            if refusal is None:
                fused = _fuse(graph, node, total)
                for old, new in ((node, fused.outputs[0]), (total, fused.outputs[-1])):
                    token_axes.setdefault(new.name, token_axes.get(old.outputs[0].name, ()))
                changed = True
            else:
                ctx.skip(node, refusal.about("no SkipLayerNormalization").reason)
        return bool(graph.remove_dead()) or changed


def _obstacle(norm: Node, total: Node, token_axes: Mapping[str, Axes]) -> Refusal | None:
    vectors = [t for t in norm.inputs[1:] if t.name]
    if not all(is_constant(t) and len(t.shape) == 1 for t in vectors):
        return Refusal("scale or shift is not a constant vector")
    if len([t for t in norm.outputs if t.name]) > 1:
        return Refusal("its output of means or deviations is used")
    if norm.attrs.get("axis", -1) not in (-1, 2):
        return Refusal("it is not over the last axis")
    if not all(is_float(t) for t in total.inputs):
        return Refusal("the sum is not float32")
    shapes = [shape_of(t) for t in total.inputs]
    if any(s is None or len(s) != 3 or s[2] != vectors[0].shape[0] for s in shapes):
        return Refusal("the operands of the sum are not [batch, length, width of the norm]")
    same = shapes[0] == shapes[1] and None not in (shapes[0] or ())
    if not (same or all(by_position(token_axes.get(t.name)) for t in total.inputs)):
        return Refusal("the operands of the sum are not known to have the same shape")
    return None


def _fuse(graph: Graph, norm: Node, total: Node) -> Node:
    out, summed = norm.outputs[0], total.outputs[0]
    data, skip, bias = _biased(graph, total)
    exclusive = graph.only_consumer(summed) is not None
    vectors = [*norm.inputs[1:], None][:2]  # the shift may be left out
    fused = graph.add(
        "SkipLayerNormalization",
        [data, skip, *vectors, *([] if bias is None else [bias])],
        [f"{out.name}/skip", *([] if exclusive else [None, None, f"{summed.name}/sum"])],
        {"epsilon": norm.attrs.get("epsilon", 1e-5)},
        domain=MICROSOFT,
        like=out,
    )
    if not exclusive:
        sums = fused.outputs[3]
        sums.dtype, sums.shape = summed.dtype, summed.shape
        graph.replace_uses(summed, sums)
    graph.replace_uses(out, fused.outputs[0])
    return fused


def _biased(graph: Graph, total: Node) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, y, b) of the sum x + b + y."""
    for data, skip in (total.inputs, reversed(total.inputs)):
        add = graph.producer(data, "Add")
        if add is None or graph.only_consumer(data) is None:
            continue
        for bias, inner in (add.inputs, reversed(add.inputs)):
            width = (shape_of(data) or ())[-1:]
            if is_constant(bias) and shape_of(bias) == width and shape_of(inner) == shape_of(data):
                return inner, skip, bias
    return total.inputs[0], total.inputs[1], None
