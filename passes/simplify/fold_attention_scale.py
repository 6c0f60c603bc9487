"""Folds a scalar factor on attention scores into the linear layer before them.

    MatMul(Transpose(Reshape(x·Wq + bq)), Kᵀ) / √d   →   MatMul(Transpose(Reshape(x·W' + b')), Kᵀ)
    with W' = Wq/√d and b' = bq/√d

Any Mul or Div by a scalar constant is moved backwards, through layout operators and at most one
matrix multiplication of two activations, to a MatMul or Gemm with a constant weight. One
elementwise kernel per layer disappears, and the per-channel scales of int8 weights absorb the
factor. Refuses where a tensor on the way has a second reader, or the weight is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import (
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    is_constant,
    is_float,
    is_op,
    rank,
    scaled_operand,
)
from qcompile.ir.operators import MOVERS
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class _Scaling:
    """``result`` is ``source`` times ``factor``; ``constants`` (node, input) get it instead."""

    result: Tensor
    source: Tensor
    factor: float
    constants: list[tuple[Node, int]]


@dataclass(frozen=True)
class FoldAttentionScale(NodeRewrite[_Scaling]):
    """Let weights carry scalar factors."""

    name: ClassVar[str] = "fold-attention-scale"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    ops: ClassVar[tuple[str, ...]] = ("Mul", "Div")

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Scaling | Refusal | None:
        scaling = scaled_operand(node)
        if scaling is None or not is_float(scaling[0]):
            return None
        source, factor = scaling
        if any((rank(t) or 0) > (rank(source) or 0) for t in node.inputs if t is not source):
            return None  # a factor of shape [1,1,1] raises the rank of a matrix
        constants = _constants_before(graph, source)
        if constants is None or isinstance(constants, Refusal):
            return constants  # None: an ordinary multiplication
        user, index = constants[-1]
        weight = user.inputs[index]
        if len(graph.consumers(weight)) > 1 or graph.is_output(weight):
            return Refusal(f"weight {weight.name!r} is shared")
        return _Scaling(node.outputs[0], source, factor, constants)

    def rewrite(self, graph: Graph, ctx: Context, match: _Scaling) -> None:
        for user, index in match.constants:
            old = user.inputs[index]
            scaled = array(old) * np.float32(match.factor)
            graph.set_constant(user, index, scaled, f"{old.name}/scaled")
        graph.replace_uses(match.result, match.source)
        graph.remove_dead()  # a dead second reader would block the next factor


def _constants_before(graph: Graph, tensor: Tensor) -> list[tuple[Node, int]] | Refusal | None:
    """The constants, as (node, input), whose scaling scales ``tensor``, the weight last.

    None where no linear layer is found, a Refusal where one cannot be used.
    """
    constants: list[tuple[Node, int]] = []
    crossed_matmul = False
    while True:
        node = graph.producer(tensor)
        if node is None:
            return None
        if graph.only_consumer(tensor) is None:
            reason = f"{tensor.name!r} has another reader"
            return Refusal(reason) if crossed_matmul else None
        if is_op(node, *MOVERS, "Identity"):
            tensor = node.inputs[0]
        elif is_op(node, "Add") and not constants and (slot := _constant_input(node)) is not None:
            constants.append((node, slot))
            tensor = node.inputs[1 - slot]
        elif is_op(node, "MatMul") and is_constant(node.inputs[1]):
            return [*constants, (node, 1)]
        elif is_op(node, "Gemm") and is_constant(node.inputs[1]):
            return _gemm(node, constants)
        elif is_op(node, "MatMul") and not crossed_matmul and not constants:
            crossed_matmul = True
            tensor = node.inputs[0]
        else:
            return None


def _gemm(node: Node, constants: list[tuple[Node, int]]) -> list[tuple[Node, int]] | Refusal:
    if len(node.inputs) > 2 and node.inputs[2].name:
        if not is_constant(node.inputs[2]):
            return Refusal(f"the bias of {node.name!r} is not constant")
        constants = [*constants, (node, 2)]
    return [*constants, (node, 1)]


def _constant_input(node: Node) -> int | None:
    return next((i for i, t in enumerate(node.inputs) if is_constant(t)), None)
