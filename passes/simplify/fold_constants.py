"""Evaluates nodes that depend only on constants, in ONNX Runtime.

    y = Add(@a, @b)                →   @y
    q = QuantizeLinear(@w, s, z)   →   @q : int8

A model trained with fake quantization has float weights behind QuantizeLinear: they become the
integers that it was trained with. Refuses: random and stateful operators, subgraphs, dequantizers
(a weight's DequantizeLinear must stay), results over ``max_growth`` times their inputs (a Tile or
Expand would blow up the file).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor
from qcompile.ir.analysis.constant_evaluation import evaluable, put_values
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_SMALL_BYTES = 1 << 16
_FEW_BYTES = 1 << 10  # of shapes, bounds and the like


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute at compile time what does not depend on any input.

    max_growth: largest ratio of result to operand bytes, for results over 64 KiB.
    """

    max_growth: float = 1.5

    name: ClassVar[str] = "fold-constants"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        nodes = evaluable(graph, lambda node: self._affordable(node, ctx))
        values = ctx.evaluate(graph, nodes) if nodes else {}
        if isinstance(values, Refusal):
            for node in nodes:
                ctx.skip(node, values.about("cannot be evaluated").reason)
            return False
        generated = _generated(nodes)
        names = put_values(graph, nodes, values)
        ctx.generated |= {new for old, new in names.items() if old in generated}
        return bool(graph.remove_dead()) or bool(names)

    def _affordable(self, node: Node, ctx: Context) -> bool:
        sizes = [_bytes(t) for t in node.outputs if t.name]
        operands = sum(_bytes(t) or 0 for t in node.inputs)
        known = [s for s in sizes if s is not None]
        # Where weights are quantized they may be converted first, otherwise they stay as stored.
        free = 0 if operands > _FEW_BYTES and ctx.choices.mode == "float" else _SMALL_BYTES
        if len(known) < len(sizes) or sum(known) > max(free, self.max_growth * operands):
            ctx.skip(
                node, "its result would be much larger than its operands, or is of unknown size"
            )
            return False
        return True


def _generated(nodes: Sequence[Node]) -> set[str]:
    """Outputs that are computed from small constants alone, in the order of the graph."""
    outputs = {t.name for n in nodes for t in n.outputs}
    found: set[str] = set()
    for node in nodes:
        inputs = [t for t in node.inputs if t.name]
        small = (t.name in found or (_bytes(t) or 0) <= _FEW_BYTES for t in inputs)
        own = (t.name in found or t.name not in outputs for t in inputs)
        if all(small) and all(own):
            found |= {t.name for t in node.outputs}
    return found


def _bytes(tensor: Tensor) -> int | None:
    """Size in bytes, None where type or shape is not fully known."""
    shape, dtype = tensor.shape, tensor.dtype
    if shape is None or dtype is None or not all(isinstance(d, int) for d in shape):
        return None
    try:
        size: int = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    except TypeError:
        return None
    return size
