"""Raises the ONNX opset of the graph, and rewrites nodes whose definition changed on the way.

    opset 14: Reshape, MatMul, Softmax, …   →   opset 17: the same nodes

LayerNormalization exists from opset 17. Where an operator's definition changed only in the types
it allows, the nodes stay as they are; reductions (their axes became an input in opset 18) and Split
are rewritten. Opsets before 13, where Softmax, Squeeze and ReduceSum had another meaning, and
operators whose meaning changed on the way are converted by ONNX's version converter. 16-bit
integers, where the user asks for any, need opset 21, as 4-bit ones do; those of 2 bits
need 25. If an opset cannot be reached, the next lower one of these is
tried. Refuses where the converter fails, and graphs
with functions, contrib operators or subgraphs, which it cannot convert; operators in subgraphs must
be able to stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import ONNX, Graph, Node, Refusal, is_onnx_domain, is_op
from qcompile.ir.model_io.opset_conversion import convert_opset
from qcompile.ir.operators import REDUCTIONS
from qcompile.ir.subgraph import bodies, subgraphs
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import WIDE_SINCE

_OLDEST = 13
# Operators whose definition changed after opset 13 in a way that can alter an existing node.
_CHANGED = {
    "AffineGrid": 20, "AveragePool": 19, "BatchNormalization": 14, "Cast": 19, "CumSum": 14,
    "DFT": 20, "DequantizeLinear": 21, "GridSample": 20, "GroupNormalization": 21,
    "Pad": 18, "QuantizeLinear": 21, "Resize": 18, "RoiAlign": 16, "ScatterElements": 18,
    "ScatterND": 18,
}  # fmt: skip
# Of those, the ones whose old attributes keep their meaning (defaults were added, none changed).
_HARMLESS = {
    "AveragePool", "Cast", "CumSum", "DequantizeLinear", "Pad", "QuantizeLinear",
    "ScatterElements", "ScatterND",
}  # fmt: skip
_AXES_INPUT = 18


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Raise the model to the opset that the target's fusions need.

    to: the opset to declare; 0 means the target's, or that of the integers that precision asks for.
    """

    to: int = 0

    name: ClassVar[str] = "raise-opset"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        wanted = [self.to] if self.to else _required_opsets(ctx)
        return any(_raise(graph, ctx, opset) for opset in wanted if graph.opset < opset)


def _raise(graph: Graph, ctx: Context, opset: int) -> bool:
    """Raise the graph to an opset; False where that is not possible, which it records."""
    obstacle = _first_obstacle(graph, opset)
    if obstacle is not None:
        where, refusal = obstacle
        failure = convert_opset(graph, opset)
        if failure is not None:
            ctx.skip(where, f"{refusal.reason}, and {failure.reason}")
        return failure is None
    if opset >= _AXES_INPUT > graph.opset:
        for node in graph.nodes:
            _move_axes(graph, node)
    graph.import_domain(ONNX, opset)
    return True


def _required_opsets(ctx: Context) -> list[int]:
    """Opsets to try, highest first: of the integers that are asked for, of the target's fusions."""
    target, choices = ctx.target, ctx.choices
    opsets = {target.opset}
    if choices.mode == "float":
        return [target.opset]
    has_wide = target.wide is not None or target.wide_weight is not None
    if has_wide and choices.asks_wide:
        opsets.add(WIDE_SINCE)
    for width in (target.few_bits[bits] for bits in choices.few_bits if bits in target.few_bits):
        opsets |= {width.since, width.needs}
    return sorted((opset for opset in opsets if opset >= target.opset), reverse=True)


def _first_obstacle(graph: Graph, opset: int) -> tuple[Node | str, Refusal] | None:
    """Where and why the nodes cannot stay as they are, None where they can."""
    if graph.opset < _OLDEST:
        return graph.name, Refusal(f"opset {graph.opset} is older than {_OLDEST}")
    obstacles = ((n, _obstacle(n, graph.opset, opset)) for n in graph.nodes)
    return next(((n, refusal) for n, refusal in obstacles if refusal is not None), None)


def _obstacle(node: Node, old: int, new: int) -> Refusal | None:
    """Why a node cannot stay as it is between two opsets, None where it can."""
    refusals = (_inner_obstacle(inner, old, new) for inner in _inner_nodes(node))
    refusal = next((r for r in refusals if r is not None), None)
    if refusal is not None:
        return refusal.about(f"in the body of {node.op}")
    return _changed(node, node.op, old, new)


def _changed(node: Node | onnx.NodeProto, op: str, old: int, new: int) -> Refusal | None:
    """Why an operator means something else in the new opset, None where it does not."""
    if not is_onnx_domain(node) or op in _HARMLESS:
        return None
    if old < _CHANGED.get(op, 0) <= new:
        return Refusal(f"{op} has another meaning in opset {new}")
    try:
        onnx.defs.get_schema(op, new)
    except onnx.defs.SchemaError:
        return Refusal(f"{op} is unknown to ONNX")
    return None


def _inner_nodes(node: Node) -> Iterator[onnx.NodeProto]:
    """The nodes in the bodies of an If, Loop or Scan, at any depth."""
    waiting = [body.proto for body in subgraphs(node)]
    for graph in waiting:
        for inner in graph.node:
            waiting += bodies(inner)
            yield inner


def _inner_obstacle(node: onnx.NodeProto, old: int, new: int) -> Refusal | None:
    """Why a node in a body cannot stay as it is, None where it can: nothing is edited there."""
    if old < _AXES_INPUT <= new and is_op(node, *REDUCTIONS, "Split"):
        return Refusal(f"{node.op_type} has other operands in opset {new}")
    return _changed(node, node.op_type, old, new)


def _move_axes(graph: Graph, node: Node) -> None:
    """Rewrite attributes that opset 18 turned into inputs or made mandatory."""
    if is_op(node, *REDUCTIONS) and "axes" in node.attrs:
        axes = np.array(node.attrs.pop("axes"), np.int64)
        node.inputs.append(graph.constant(f"{node.name}/axes", axes))
    if is_op(node, "Split") and len(node.inputs) < 2 and "num_outputs" not in node.attrs:
        node.attrs["num_outputs"] = len(node.outputs)
