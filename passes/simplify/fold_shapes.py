"""Replaces shape arithmetic by its result, where shape inference proves it.

    Reshape(x, Concat(Gather(Shape(x), 0), Gather(Shape(x), 1), 12, 64))  →  Reshape(x, [0,0,12,64])
    Shape(x)[-1] where that dimension is 768                              →  768
    Reshape, Expand to the shape that the tensor has already              →  nothing

A dimension becomes 0 (copied from the input) where ONNX inference gives input and output the same
symbol, or the same number for all probed input sizes; at most one other becomes -1. Refuses a
Reshape with two or more dimensions that are neither copied nor fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Shape, is_constant, is_op
from qcompile.ir.analysis.constant_evaluation import fold_shape
from qcompile.ir.analysis.shape_inference import inferred_shapes
from qcompile.ir.analysis.shape_probing import consistent_probes, equal_in, fixed_in
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Turn computed shapes into constants, with 0 and -1 for the dimensions that vary."""

    name: ClassVar[str] = "fold-shapes"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        if not any(is_op(n, "Shape", "Reshape", "Expand") for n in graph.nodes):
            return False
        shapes, changed = inferred_shapes(graph), False
        computed = any(is_op(n, "Reshape") and not is_constant(n.inputs[1]) for n in graph.nodes)
        probes = consistent_probes(graph, ctx.evaluate) if computed else []
        for node in graph.nodes:
            if is_op(node, "Shape"):
                changed |= fold_shape(graph, node, shapes.get(node.inputs[0].name))
            elif is_op(node, "Reshape", "Expand"):
                changed |= _fold_noop(graph, node, shapes) or _fold_reshape(
                    graph, ctx, node, shapes, probes
                )
        return bool(graph.remove_dead()) or changed


def _fold_noop(graph: Graph, node: Node, shapes: dict[str, Shape]) -> bool:
    """Remove a Reshape or Expand that changes no shape; False where it may change one."""
    before, after = shapes.get(node.inputs[0].name), shapes.get(node.outputs[0].name)
    if before is None or before != after or None in before:
        return False
    if graph.is_output(node.outputs[0]) and graph.producer(node.inputs[0]) is None:
        return False
    graph.replace_uses(node.outputs[0], node.inputs[0])
    return True


def _fold_reshape(
    graph: Graph,
    ctx: Context,
    node: Node,
    shapes: dict[str, Shape],
    probes: list[dict[str, Shape]],
) -> bool:
    if not is_op(node, "Reshape") or is_constant(node.inputs[1]):
        return False
    source, result = node.inputs[0].name, node.outputs[0].name
    views = [(v.get(source), v.get(result)) for v in (shapes, *probes)]
    target = _target(views[0], views[1:])
    if isinstance(target, Refusal):
        ctx.skip(node, target.reason)
        return False
    node.attrs.pop("allowzero", None)  # 0 must mean "as the input has it"
    shape = graph.constant(f"{node.inputs[1].name}/static", np.array(target, np.int64))
    graph.set_input(node, 1, shape)
    return True


View = tuple[Shape | None, Shape | None]


def _target(symbols: View, probes: list[View]) -> list[int] | Refusal:
    """The constant operand of a Reshape, or why there is none."""
    before, after = symbols
    if after is None or before is None:
        return Refusal("the rank of its input or output is unknown")
    target = [_target_dim(i, symbols, probes) for i in range(len(after))]
    if target.count(-1) > 1:
        return Refusal(
            f"two or more dimensions of {list(after)} are neither fixed nor copied from the input"
        )
    return target


def _target_dim(i: int, symbols: View, probes: list[View]) -> int:
    """Entry ``i`` of the target shape: a fixed size, 0 to copy it from the input, or -1."""
    before, after = symbols
    if after is not None and isinstance(after[i], int) and after[i] != 0:
        return int(after[i] or 0)
    if before is not None and after is not None and i < len(before) and before[i] == after[i]:
        return 0
    dims = [
        (before[i] if i < len(before) else None, after[i])
        for before, after in probes
        if before is not None and after is not None
    ]
    if len(dims) < len(probes):
        return -1
    if equal_in(dims):
        return 0
    return fixed_in([after for _, after in dims]) or -1
