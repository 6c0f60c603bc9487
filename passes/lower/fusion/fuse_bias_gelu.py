"""Fuses the bias of a linear layer into the GELU after it.

    Gelu(x + b)                        →   com.microsoft.BiasGelu(x, b)
    Gelu(x + b) {approximate="tanh"}   →   com.microsoft.FastGelu(x, b)

One kernel instead of two. On CPU, the bias goes into the int8 matrix multiplication instead, so
only other targets run this. Refuses sums with other readers. Source: ONNX Runtime contrib
operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import MICROSOFT, Graph, Node, Refusal, Tensor, is_constant, is_op, shape_of
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_TANH = "com.microsoft.FastGelu"


@dataclass(frozen=True)
class _Match:
    """A GELU of ``data`` + ``bias``."""

    node: Node
    data: Tensor
    bias: Tensor


@dataclass(frozen=True)
class FuseBiasGelu(NodeRewrite[_Match]):
    """Fuse a constant bias with the GELU that reads it."""

    name: ClassVar[str] = "fuse-bias-gelu"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    ops: ClassVar[tuple[str, ...]] = ("Gelu", "com.microsoft.Gelu", _TANH)

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        single = len([t for t in node.inputs if t.name]) == 1
        operands = _bias(graph, node.inputs[0]) if single else None
        if operands is None:
            return None
        if graph.only_consumer(node.inputs[0]) is None:
            return Refusal("the bias is not fused: the sum has other readers")
        return _Match(node, *operands)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        node = match.node
        tanh = is_op(node, _TANH) or node.attrs.get("approximate") == "tanh"
        op, inputs = "FastGelu" if tanh else "BiasGelu", [match.data, match.bias]
        graph.substitute(node.outputs[0], op, inputs, "bias", domain=MICROSOFT)


def _bias(graph: Graph, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(x, b) of a sum with a constant vector of x's width."""
    add = graph.producer(tensor, "Add")
    if add is None:
        return None
    for bias, data in (add.inputs, reversed(add.inputs)):
        width = (shape_of(data) or ())[-1:]
        if is_constant(bias) and width and shape_of(bias) == width:
            return data, bias
    return None
