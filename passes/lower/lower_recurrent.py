"""Turns LSTMs with quantized weights into ONNX Runtime's integer LSTM.

    LSTM(x, Reshape(DQ(Wq, s)), Reshape(DQ(Rq, t)), b, ...)
        →   DynamicQuantizeLSTM(x, Wqᵀ, Rqᵀ, b, ..., s, 0, t, 0)

It quantizes x, over all steps and the whole batch, and the state in each step. Weights become
[directions, inputs, 4 * hidden], with one scale for each gate and unit. Refuses weights of which
one is float, or that are not symmetric int8 per row, and activations without bounds. Source: ONNX
Runtime dynamic_quantize_lstm.cc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import (
    MICROSOFT,
    Constant,
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    is_constant,
    is_zero,
    shape_of,
)
from qcompile.ir.recurrent_layers import WEIGHTS, has_bounded_state
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_OPTIONAL = 8  # operands of LSTM; those of DynamicQuantizeLSTM that follow are scales


@dataclass(frozen=True)
class _Match:
    """An LSTM, and the DequantizeLinear nodes of its two weights."""

    node: Node
    weights: tuple[Node, Node]


@dataclass(frozen=True)
class LowerRecurrent(NodeRewrite[_Match]):
    """Lower LSTMs to DynamicQuantizeLSTM."""

    name: ClassVar[str] = "lower-recurrent"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("LSTM",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        found = [_dequantizer(graph, node.inputs[slot]) for slot in WEIGHTS]
        weights = [w for w in found if w is not None]
        if not weights:
            return None
        if len(weights) < len(WEIGHTS):
            return Refusal("only one of its weights is quantized")
        if not has_bounded_state(node):
            return Refusal("an activation without bounds: its state could outgrow 8 bits")
        if not all(_is_symmetric_by_row(w) for w in weights):
            return Refusal("a weight is not symmetric int8 per row")
        return _Match(node, (weights[0], weights[1]))

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        node = match.node
        values, scales = list[Tensor](), list[Tensor]()
        for slot, weight in zip(WEIGHTS, match.weights, strict=True):
            shape = node.inputs[slot].shape
            operands = _operands(graph, ctx, weight, (shape[0], shape[1], shape[2]))
            values.append(operands[0])
            scales += operands[1:]
        rest = [*node.inputs[len(WEIGHTS) + 1 :], *[None] * _OPTIONAL][: _OPTIONAL - 3]
        lowered = graph.add(
            "DynamicQuantizeLSTM",
            [node.inputs[0], *values, *rest, *scales],
            [f"{t.name}/int8" if t.name else None for t in node.outputs],
            {k: v for k, v in node.attrs.items() if k != "layout"},
            domain=MICROSOFT,
            name=f"{node.name}/int8",
        )
        for old, new in zip(node.outputs, lowered.outputs, strict=True):
            if old.name:
                new.dtype, new.shape = old.dtype, old.shape
                graph.replace_uses(old, new)


def _dequantizer(graph: Graph, weight: Tensor) -> Node | None:
    reshape = graph.producer(weight, "Reshape")
    return None if reshape is None else graph.producer(reshape.inputs[0], "DequantizeLinear")


def _is_symmetric_by_row(weight: Node) -> bool:
    values, scale = weight.inputs[:2]
    if not is_constant(values) or values.dtype != np.int8 or not is_constant(scale):
        return False
    by_row = weight.attrs.get("axis", 1) == 0 and shape_of(scale) == tuple(values.shape[:1])
    return by_row and all(is_zero(t) for t in weight.inputs[2:])


def _operands(
    graph: Graph, ctx: Context, weight: Node, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scale and zero point as the operator takes them.

    Its kernel steps through zero points as through scales, so there are as many.
    """
    rows, scale = weight.inputs[:2]
    made = (
        (rows, "transposed", array(rows).reshape(shape).transpose(0, 2, 1)),
        (scale, "directions", array(scale).reshape(shape[:2])),
        (rows, "zero_points", np.zeros(shape[:2], np.int8)),
    )
    values, scales, zeros = (_once(graph, ctx, *one) for one in made)
    return values, scales, zeros


def _once(graph: Graph, ctx: Context, old: Tensor, what: str, values: Array) -> Constant:
    """The constant made of another; layers that share a weight share it too."""
    known = graph.constants().get(f"{old.name}/{what}")
    if known is not None and np.array_equal(array(known), values):
        return known
    new = graph.constant(f"{old.name}/{what}", values)
    ctx.origins[new.name] = ctx.origins.get(old.name, (old.name, None))
    return new
