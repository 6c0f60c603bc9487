"""Tensors that join the values of several others, each value unchanged: Concat and the like.

A joined tensor has one range, while its branches may have ranges of their own: boxes in pixels
next to scores between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import onnx

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
    scalar,
)
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.node_proto import fill_tensor, node_proto
from qcompile.ir.operators import ACTIVATIONS, FUNCTIONS, MOVERS

# The input slots of values in operators that select between them; Concat joins all its inputs.
_JOINING = {
    "Max": None,
    "Min": None,
    "Pad": (0,),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Where": (1, 2),
}
# Their results consist of values of the first operand, or of means of neighbours.
_KEEPING = ("AveragePool", "Identity", "MaxPool", "Resize", "Sum", "Upsample")
# Operators value by value, if all operands but one are scalar constants.
_FUNCTIONS = (*ACTIVATIONS, *FUNCTIONS, "Add", "Clip", "Div", "Mul", "Neg", "Pow", "Sqrt", "Sub")
_Cut: TypeAlias = frozenset[int]  # axes along which only a part is left
_POINTS = 257  # of a branch's range, to find the range of a function of it


@dataclass(frozen=True, eq=False)
class Branch:
    """A tensor whose values are joined; ``functions``: what is applied after the join, value by
    value, first to last."""

    tensor: Tensor
    functions: tuple[Node, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for equal branches: names identify nodes and tensors."""
        return (self.tensor.name, *(node.name for node in self.functions))

    def range_after(
        self, graph: Graph, evaluate: Evaluator, low: float, high: float
    ) -> tuple[float, float] | None:
        """The range in the joined tensor, for that of the branch; None where it is not finite."""
        if not self.functions:
            return low, high
        values = evaluate(small := _applied(graph, self.functions, low, high), small.nodes)
        last = None if isinstance(values, Refusal) else values[small.nodes[-1].outputs[0].name]
        if last is None or not np.isfinite(last).all():
            return None
        return float(last.min()), float(last.max())


def _applied(graph: Graph, functions: tuple[Node, ...], low: float, high: float) -> Graph:
    """The functions as a graph of their own, on points of an interval."""
    proto = onnx.GraphProto(name="functions")
    points = np.linspace(low, high, _POINTS, dtype=np.float32)
    proto.initializer.append(onnx.numpy_helper.from_array(points, "value/0"))
    for i, node in enumerate(functions):
        operands = [t for t in node.inputs if is_constant(t)]
        for constant in operands:
            fill_tensor(proto.initializer.add(), constant)
        made = node_proto(node)
        names = [t.name if not t.name or is_constant(t) else f"value/{i}" for t in node.inputs]
        made.input[:], made.output[:] = names, [f"value/{i + 1}"]
        proto.node.append(made)
    proto.output.append(onnx.ValueInfoProto(name=f"value/{len(functions)}"))
    imports = [onnx.helper.make_opsetid(d, v) for d, v in graph.domains().items()]
    return from_proto(onnx.helper.make_model(proto, opset_imports=imports))


def branches(graph: Graph, tensor: Tensor) -> list[Branch]:
    """What a tensor joins, each once; none where it joins nothing.

    Layout operators, pools and functions of single values after the join are looked through, and
    other joins before it. A part that was cut out along the axis of a Concat belongs to no branch
    for certain: it counts as no join. Constants count as branches of Concat and Scatter, elsewhere
    they are fillers.
    """
    found, joined = _Walk(graph).sources(tensor, frozenset())
    return found if joined else []


class _Walk:
    """Branches by tensor and cut axes; each is visited once, since joins may share branches."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[tuple[str, _Cut], tuple[list[Branch], bool]] = {}

    def sources(self, tensor: Tensor, cut: _Cut) -> tuple[list[Branch], bool]:
        """The nearest tensors that are computed otherwise; is there a join in between?"""
        key = (tensor.name, cut)
        if key not in self.known:
            found = self._before(tensor, cut)
            once = list({branch.key: branch for branch in found}.values())
            self.known[key] = (once or [Branch(tensor)], bool(found))
        return self.known[key]

    def _before(self, tensor: Tensor, cut: _Cut) -> list[Branch]:
        """The branches of the join that a tensor comes from, none where there is none."""
        node = self.graph.producer(tensor)
        if node is None or not node.inputs:
            return []
        if is_op(node, "Concat", *_JOINING):
            return [s for t in _joined(node, cut) for s in self.sources(t, cut)[0]]
        argument = _argument(node)
        if argument is not None:
            found, joined = self.sources(argument, cut)
            after = [replace(b, functions=(*b.functions, node)) for b in found]
            return after if joined else []
        before = _axes_before(node, cut)
        found, joined = ([], False) if before is None else self.sources(node.inputs[0], before)
        return found if joined else []


def _argument(node: Node) -> Tensor | None:
    """The operand of a function of single values, None where the node is none."""
    if not is_op(node, *_FUNCTIONS):
        return None
    data = [t for t in node.inputs if t.name and scalar(t) is None]
    return data[0] if len(data) == 1 and not is_constant(data[0]) else None


def _joined(node: Node, cut: _Cut) -> list[Tensor]:
    """The float operands that a node joins; none where it may join nothing of what is left."""
    if is_op(node, "Concat"):
        axis = _positive(node.attrs["axis"], node.outputs[0])
        return [] if cut and (axis is None or axis in cut) else [*filter(is_float, node.inputs)]
    if cut and is_op(node, "ScatterElements", "ScatterND"):
        return []
    slots = _JOINING[node.op]
    operands = [t for i, t in enumerate(node.inputs) if slots is None or i in slots]
    kept = is_op(node, "ScatterElements", "ScatterND")
    return [t for t in operands if is_float(t) and (kept or not is_constant(t))]


def _axes_before(node: Node, cut: _Cut) -> _Cut | None:
    """The cut axes of a node's first operand; None where its values are not those of the result."""
    source = node.inputs[0] if node.inputs else None
    if source is None or is_constant(source):
        return None
    if is_op(node, *_KEEPING):
        return cut if len(node.inputs) == 1 or not is_op(node, "Sum") else None
    if is_op(node, "Transpose"):
        perm = node.attrs.get("perm")
        return frozenset(perm[i] for i in cut) if perm else (None if cut else cut)
    if is_op(node, *MOVERS, "Expand"):
        return None if cut else cut
    if is_op(node, "Slice", "Split", "Gather"):
        axes = _parted(node)
        return None if axes is None else cut | axes
    return None


def _parted(node: Node) -> _Cut | None:
    """The axes along which a node takes a part, None where they are not known, or vanish."""
    source = node.inputs[0]
    if is_op(node, "Gather") and rank(node.inputs[1]) != 1:
        return None
    if is_op(node, "Slice"):
        given = node.inputs[3:4]
        axes = (
            array(given[0]).tolist() if given and is_constant(given[0]) else node.attrs.get("axes")
        )
    else:
        axes = [node.attrs.get("axis", 0)]
    found = [_positive(axis, source) for axis in axes or ()]
    known = frozenset(axis for axis in found if axis is not None)
    return known if found and len(known) == len(set(found)) else None


def _positive(axis: int, tensor: Tensor) -> int | None:
    dims = rank(tensor)
    return axis if axis >= 0 else None if dims is None else axis + dims
