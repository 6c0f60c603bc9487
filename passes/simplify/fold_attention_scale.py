"""Folds a scalar factor on attention scores into the linear layer before them.

    MatMul(Transpose(Reshape(x·Wq + bq)), Kᵀ) / √d   →   MatMul(Transpose(Reshape(x·W' + b')), Kᵀ)
    with W' = Wq/√d and b' = bq/√d

Any Mul or Div by a scalar constant is moved backwards through layout operators and products of
two activations until it meets a MatMul or Gemm with a constant weight. One elementwise kernel per
layer disappears, and int8 weights have a scale per channel that absorbs the factor. Refuses where
a tensor on the way has a second reader, or the weight is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_float, is_op, rank, scalar
from qcompile.ir.operators import MOVERS
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class FoldAttentionScale(Pass):
    """Let weights carry scalar factors."""

    name: ClassVar[str] = "fold-attention-scale"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = bool(graph.remove_dead())
        for node in graph.nodes:
            scales = is_op(node, "Mul", "Div") and _factor(node) is not None
            if scales and _fold(graph, ctx, node):
                graph.remove_dead()  # as a second reader it would stop the next factor
                changed = True
        return changed


def _factor(node: Node) -> float | None:
    """c of ``c · x``, None for other products."""
    divides = is_op(node, "Div")
    value = scalar(node.inputs[1])
    if value is None and not divides:
        value = scalar(node.inputs[0])
    if value is None or not np.isfinite(value) or value == 0:
        return None
    return 1 / value if divides else value


def _fold(graph: Graph, ctx: Context, node: Node) -> bool:
    factor = _factor(node)
    source = next(t for t in node.inputs if scalar(t) is None)
    if factor is None or not is_float(source):
        return False
    if any((rank(t) or 0) > (rank(source) or 0) for t in node.inputs if t is not source):
        return False  # a factor of shape [1,1,1] raises the rank of a matrix
    linear = _linear_behind(graph, source)
    if linear is None:
        return False  # a product like any other, not a refusal
    if isinstance(linear, str):
        ctx.skip(node, linear)
        return False
    weight = linear[-1][0].inputs[linear[-1][1]]
    if len(graph.consumers(weight)) > 1 or graph.is_output(weight):
        ctx.skip(node, f"weight {weight.name!r} is shared")
        return False
    for user, index in linear:
        old = user.inputs[index]
        graph.set_constant(user, index, (array(old) * np.float32(factor)), f"{old.name}/scaled")
    graph.replace_uses(node.outputs[0], source)
    return True


def _linear_behind(graph: Graph, tensor: Tensor) -> list[tuple[Node, int]] | str | None:
    """Constant operands to multiply so that ``tensor`` is multiplied, or why not."""
    constants: list[tuple[Node, int]] = []
    crossed_product = False
    while True:
        node = graph.producer(tensor)
        if node is None:
            return None
        if graph.only_consumer(tensor) is None:
            return f"{tensor.name!r} has another reader" if crossed_product else None
        if is_op(node, *MOVERS, "Identity"):
            tensor = node.inputs[0]
        elif is_op(node, "Add") and not constants and (place := _constant_input(node)) is not None:
            constants.append((node, place))
            tensor = node.inputs[1 - place]
        elif is_op(node, "MatMul") and is_constant(node.inputs[1]):
            return [*constants, (node, 1)]
        elif is_op(node, "Gemm") and is_constant(node.inputs[1]):
            return _gemm(node, constants)
        elif is_op(node, "MatMul") and not crossed_product and not constants:
            crossed_product = True
            tensor = node.inputs[0]
        else:
            return None


def _gemm(node: Node, constants: list[tuple[Node, int]]) -> list[tuple[Node, int]] | str:
    if len(node.inputs) > 2 and node.inputs[2].name:
        if not is_constant(node.inputs[2]):
            return f"the bias of {node.name!r} is not constant"
        constants = [*constants, (node, 2)]
    return [*constants, (node, 1)]


def _constant_input(node: Node) -> int | None:
    return next((i for i, t in enumerate(node.inputs) if is_constant(t)), None)
