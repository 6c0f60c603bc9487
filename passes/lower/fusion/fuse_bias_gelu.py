"""Adds the bias of a linear inside GELU.

    Gelu(x + b)                        →   com.microsoft.BiasGelu(x, b)
    Gelu(x + b) {approximate="tanh"}   →   com.microsoft.FastGelu(x, b)

One kernel instead of two; on CPU the bias belongs into the integer product, so this is for targets
that list it. Refuses sums that something else reads. Source: ONNX Runtime contrib operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import MICROSOFT, Graph, Node, Tensor, is_constant, is_op, shape_of
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_EXACT = ("Gelu", "com.microsoft.Gelu")
_TANH = "com.microsoft.FastGelu"


@dataclass(frozen=True)
class FuseBiasGelu(Pass):
    """Fuse a constant bias with the GELU that reads it."""

    name: ClassVar[str] = "fuse-bias-gelu"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if not is_op(node, *_EXACT, _TANH) or len([t for t in node.inputs if t.name]) > 1:
                continue
            found = _bias(graph, node.inputs[0])
            if found is None:
                continue
            if graph.only_consumer(node.inputs[0]) is None:
                ctx.skip(node, "no bias inside: something else reads the sum")
                continue
            _fuse(graph, node, *found)
            changed = True
        return bool(graph.remove_dead()) or changed


def _bias(graph: Graph, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(x, b) of a sum with a constant vector of x's width."""
    add = graph.producer(tensor)
    if add is None or not is_op(add, "Add"):
        return None
    for bias, data in (add.inputs, reversed(add.inputs)):
        width = (shape_of(data) or ())[-1:]
        if is_constant(bias) and width and shape_of(bias) == width:
            return data, bias
    return None


def _fuse(graph: Graph, node: Node, data: Tensor, bias: Tensor) -> None:
    out = node.outputs[0]
    tanh = is_op(node, _TANH) or node.attrs.get("approximate") == "tanh"
    op = "FastGelu" if tanh else "BiasGelu"
    made = graph.add(op, [data, bias], [f"{out.name}/bias"], domain=MICROSOFT, like=out)
    graph.replace_uses(out, made.outputs[0])
