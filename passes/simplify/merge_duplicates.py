"""Common subexpression elimination: equal nodes on equal inputs are computed once.

    a = Cast(m); b = Cast(m)   →   a = Cast(m)

Exporters repeat the attention mask and shape arithmetic in each layer, and store a weight once for
each layer that reads it. Refuses random operators, nodes with subgraphs, and nodes that compute a
graph output.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from qcompile.ir import Graph, Node, Tensor, array, has_subgraph, is_constant
from qcompile.ir.operators import RANDOM
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_RANDOM = {*RANDOM, "Dropout"}
_SMALL = 64


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Compute equal things once.

    weights: also store weights with equal contents once. Passes that fold factors into weights
    come first: they refuse shared ones.
    """

    weights: bool = False

    name: ClassVar[str] = "merge-duplicates"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = self.weights and graph.merge_weights()
        first: dict[Hashable, Node] = {}
        for node in graph.nodes:
            if node.op in _RANDOM or not node.outputs or graph.is_custom(node):
                continue
            key = _key(node)
            if key is None:
                continue
            original = first.setdefault(key, node)
            if original is not node:
                changed |= _merge(graph, ctx, original, node)
        return bool(graph.remove_dead()) or changed


def _merge(graph: Graph, ctx: Context, original: Node, node: Node) -> bool:
    if any(graph.is_output(t) for t in node.outputs):
        ctx.skip(node, "it carries the name of a graph output")
        return False
    for old, new in zip(node.outputs, original.outputs, strict=True):
        if old.name and old.outputs:
            graph.replace_uses(old, new)
    return True


def _key(node: Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for a node with a subgraph."""
    if has_subgraph(node):
        return None
    attrs = tuple((k, _attribute_key(v)) for k, v in sorted(node.attrs.items()))
    inputs = tuple(_tensor_key(t) for t in node.inputs)
    # an omitted output cannot replace one that is present
    present = tuple(bool(t.name) for t in node.outputs)
    return (node.op, node.domain, present, attrs, inputs)


def _attribute_key(value: object) -> Hashable:
    return _tensor_key(value) if isinstance(value, gs.Tensor) else repr(value)


def _tensor_key(tensor: Tensor) -> Hashable:
    """Small constants are compared by value, all else by name, so that no weight is read."""
    if is_constant(tensor) and int(np.prod(tensor.shape, dtype=np.int64)) <= _SMALL:
        values = array(tensor)
        return (values.dtype.str, values.shape, values.tobytes())
    return str(tensor.name)
