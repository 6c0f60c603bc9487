"""How operators map the axes of their operands to axes of their outputs: one rule per operator.

A rule returns the outputs' axes, and merges axes that must have one order. Operators that read or
write single entries of an axis pin it: its order must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Shape, Tensor, array, is_constant, op_name, shape_of
from qcompile.ir.analysis.axis_factors import (
    Axis,
    Size,
    axis_of,
    leaves,
    pin,
    regroup,
    size_of,
    unify,
)
from qcompile.ir.operators import ELEMENTWISE, NORMALIZATIONS, REDUCTIONS

Axes: TypeAlias = list[Axis]
# Constants up to this many elements are searched for axes along which they do not vary.
_SMALL = 1 << 16


@dataclass
class Flow:
    """Axes by tensor name, for tensors of known rank.

    ``hidden``: axes of intermediate results inside operators, such as the sums of a Softmax and the
    products of a MatMul before their sum. They show which entries are combined.
    """

    graph: Graph
    probes: list[dict[str, Shape]]
    axes: dict[str, Axes] = field(default_factory=dict)
    hidden: list[Axes] = field(default_factory=list)
    fixed: set[str] = field(default_factory=set)  # made of constants alone

    def sizes(self, tensor: Tensor) -> list[Size] | None:
        """Each dimension's size in every probe, None where one is unknown in some probe."""
        declared = shape_of(tensor)
        for found in ([p.get(tensor.name) for p in self.probes], [declared] * len(self.probes)):
            known = [s for s in found if s is not None and all(isinstance(d, int) for d in s)]
            if len(known) == len(self.probes) and len({len(s) for s in known}) == 1:
                return [tuple(int(d or 0) for d in column) for column in zip(*known, strict=True)]
        return None

    def fresh(self, tensor: Tensor, pinned: str | None = None) -> Axes | None:
        """New axes, unrelated to others; None where their sizes are unknown."""
        sizes = self.sizes(tensor)
        return None if sizes is None else [axis_of(s, pinned) for s in sizes]

    def of(self, tensor: Tensor) -> Axes | None:
        """A tensor's axes; an omitted input is a scalar."""
        if not tensor.name:
            return []
        if is_constant(tensor) and tensor.name not in self.axes:
            shape = [(int(n),) * len(self.probes) for n in tensor.shape]
            self.axes[tensor.name] = [axis_of(size) for size in shape]
            self.fixed.add(tensor.name)
        found = self.axes.get(tensor.name)
        return None if found is None else [leaves(axis) for axis in found]

    def size(self, axis: Axis) -> Size:
        return size_of(axis, len(self.probes))

    def weigh(self, tensor: Tensor, axes: Axes) -> None:
        """Mark the axes as weighted, if the tensor is constant."""
        if tensor.name in self.fixed:
            for factor in (f for axis in axes for f in leaves(axis)):
                factor.weighted = True


# What a rule returns: the axes of each output, or why all axes of the inputs must keep their order.
Result: TypeAlias = list[Axes] | Refusal
Rule: TypeAlias = Callable[[Flow, Node, list[Axes]], Result]


def reason(node: Node, why: str) -> str:
    """Why an axis is pinned, with the node that pins it."""
    return f"{op_name(node)} {node.name!r} {why}"


# ---- rules: values in place


def _elementwise(flow: Flow, node: Node, given: list[Axes]) -> Result:
    axes = _in_place(node, given)
    return axes if isinstance(axes, Refusal) else [axes for _ in node.outputs]


def _normalize(flow: Flow, node: Node, given: list[Axes]) -> Result:
    """Mean and variance do not depend on the order of the normalized entries."""
    axes = _in_place(node, given)
    if isinstance(axes, Refusal):
        return axes
    start = int(node.attrs.get("axis", -1)) % len(axes)
    rest = [axis if i < start else [] for i, axis in enumerate(axes)]
    flow.hidden.append(rest)
    return [axes, *(rest for _ in node.outputs[1:])]


def _softmax(flow: Flow, node: Node, given: list[Axes]) -> Result:
    axes = given[0]
    if flow.graph.opset < 13:  # older versions flatten all axes from there on
        return Refusal("flattens its input")
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    flow.hidden.append([a for i, a in enumerate(axes) if i != axis])
    return [axes]


def _reduce(flow: Flow, node: Node, given: list[Axes]) -> Result:
    """Sums, products and extrema do not depend on the order of entries."""
    axes = given[0]
    chosen = _axes_of(node, 1, "axes")
    if isinstance(chosen, Refusal):
        return chosen
    if not chosen and not node.attrs.get("noop_with_empty_axes", 0):
        chosen = list(range(len(axes)))
    gone = {i % len(axes) for i in chosen or ()}
    if node.attrs.get("keepdims", 1):
        return [[[] if i in gone else axis for i, axis in enumerate(axes)]]
    return [[axis for i, axis in enumerate(axes) if i not in gone]]


def _in_place(node: Node, given: list[Axes]) -> Axes | Refusal:
    """Axes of an elementwise operator's result.

    A constant that does not vary along an axis fits any order, so it relates no axes: exporters
    share one vector of zeros between unrelated biases.
    """
    made = _broadcast([_varying(t, a) for t, a in zip(node.inputs, given, strict=True)])
    if isinstance(made, Refusal):
        return made
    for axes in given:
        for i, axis in enumerate(axes, len(made) - len(axes)):
            made[i] = made[i] or axis
    return made


def _varying(tensor: Tensor, axes: Axes) -> Axes:
    """An operand's axes, empty where it is a constant that does not vary along them."""
    size = np.prod(tensor.shape, dtype=np.int64) if is_constant(tensor) else 0
    if not 0 < size <= _SMALL:
        return axes
    values = array(tensor)
    same = [bool((values == values.take([0], i)).all()) for i in range(len(axes))]
    return [[] if s else axis for s, axis in zip(same, axes, strict=True)]


def _broadcast(operands: Sequence[Axes]) -> Axes | Refusal:
    """Axes of the result of broadcasting, which aligns operands at their last axis."""
    wide = max((len(axes) for axes in operands), default=0)
    made: Axes = [[] for _ in range(wide)]
    for axes in operands:
        for i, axis in enumerate(axes, wide - len(axes)):
            if made[i] and axis and not unify(made[i], axis):
                return Refusal("splits it in a way that does not fit another")
            made[i] = made[i] or axis
    return made


# ---- rules: matrix multiplications


def _matmul(flow: Flow, node: Node, given: list[Axes]) -> Result:
    left, right = given
    for tensor, axes in zip(node.inputs[:2], given, strict=True):
        flow.weigh(tensor, axes)
    if not unify(left[-1], right[-2:][0]):
        return Refusal("splits it in a way that does not fit another")
    batch = _broadcast([left[:-2], right[:-2]])
    if isinstance(batch, Refusal):
        return batch
    columns = right[-1:] if len(right) > 1 else []
    flow.hidden.append([*batch, *left[-2:], *columns])  # products before their sum
    return [[*batch, *left[-2:-1], *columns]]


def _gemm(flow: Flow, node: Node, given: list[Axes]) -> Result:
    left = given[0][::-1] if node.attrs.get("transA", 0) else given[0]
    right = given[1][::-1] if node.attrs.get("transB", 0) else given[1]
    result = _matmul(flow, node, [left, right])
    if isinstance(result, Refusal) or len(given) < 3:
        return result
    axes = _broadcast([result[0], _varying(node.inputs[2], given[2])])
    return axes if isinstance(axes, Refusal) else [axes]


def _attention(flow: Flow, node: Node, given: list[Axes]) -> Result:
    """Softmax(Q·Kᵀ)·V on [batch, heads, tokens, channels], without a cache."""
    more = [t for t in (*node.inputs[4:], *node.outputs[1:]) if t.name]
    query, key, value = given[:3]
    if more or any(len(axes) != 4 for axes in (query, key, value)):
        return Refusal("is supported only with four axes and without past keys")
    if not unify(query[3], key[3]):
        return Refusal("splits it in a way that does not fit another")
    for other in (key, value):
        if not unify(query[1], other[1]):
            return Refusal("shares keys between heads")
    for axis in (*query[:3], *key[:3], *value[:3], *(a for axes in given[3:] for a in axes)):
        pin(axis, reason(node, "pairs heads and tokens"))
    return [[*query[:3], value[3]]]


def _gather(flow: Flow, node: Node, given: list[Axes]) -> Result:
    data, indices = given
    axis = int(node.attrs.get("axis", 0)) % len(data)
    pin(data[axis], reason(node, "looks its entries up"))
    rest = [a for i, a in enumerate(data) if i != axis]
    flow.weigh(node.inputs[0], rest)
    return [[*data[:axis], *indices, *data[axis + 1 :]]]


# ---- rules: layout


def _transpose(flow: Flow, node: Node, given: list[Axes]) -> Result:
    perm = node.attrs.get("perm") or range(len(given[0]))[::-1]
    return [[given[0][int(i)] for i in perm]]


def _unsqueeze(flow: Flow, node: Node, given: list[Axes]) -> Result:
    added = _axes_of(node, 1, "axes")
    if isinstance(added, Refusal):
        return added
    wide = len(given[0]) + len(added or ())
    new = {i % wide for i in added or ()}
    rest = iter(given[0])
    return [[[] if i in new else next(rest) for i in range(wide)]]


def _squeeze(flow: Flow, node: Node, given: list[Axes]) -> Result:
    chosen = _axes_of(node, 1, "axes")
    if isinstance(chosen, Refusal):
        return chosen
    if chosen is None:
        return [[axis for axis in given[0] if axis]]
    gone = {i % len(given[0]) for i in chosen}
    return [[axis for i, axis in enumerate(given[0]) if i not in gone]]


def _reshape(flow: Flow, node: Node, given: list[Axes]) -> Result:
    sizes = _target_sizes(flow, node, given[0]) or flow.sizes(node.outputs[0])
    if sizes is None:
        return Refusal("makes a tensor of unknown shape")
    axes = regroup(given[0], sizes)
    return Refusal("splits it in a way that cannot be followed") if axes is None else [axes]


def _flatten(flow: Flow, node: Node, given: list[Axes]) -> Result:
    axis = int(node.attrs.get("axis", 1))
    axis += len(given[0]) if axis < 0 else 0
    return [[[f for a in part for f in a] for part in (given[0][:axis], given[0][axis:])]]


def _target_sizes(flow: Flow, node: Node, axes: Axes) -> list[Size] | None:
    """Sizes from a Reshape's constant shape, where inference does not know its input; else None."""
    if len(node.inputs) < 2 or not is_constant(node.inputs[1]) or node.attrs.get("allowzero", 0):
        return None
    target = [int(n) for n in array(node.inputs[1])]
    if any(n == 0 and i >= len(axes) for i, n in enumerate(target)):
        return None
    count = len(flow.probes)
    sizes = [(abs(n),) * count if n else flow.size(axes[i]) for i, n in enumerate(target)]
    if -1 in target:  # its size is 1 in ``sizes`` so far
        total = np.prod([flow.size(axis) for axis in (*axes, [])], axis=0, dtype=np.int64)
        others = np.prod(sizes, axis=0, dtype=np.int64)
        sizes[target.index(-1)] = tuple(int(n) for n in total // np.maximum(others, 1))
    return sizes


def _expand(flow: Flow, node: Node, given: list[Axes]) -> Result:
    """Copies along an axis are all equal: they fit any order."""
    wide = flow.fresh(node.outputs[0])
    if wide is None:
        return Refusal("makes a tensor of unknown shape")
    kept: Axes = [*([] for _ in range(len(wide) - len(given[0]))), *given[0]]
    return [[axis or new for axis, new in zip(kept, wide, strict=True)]]


# ---- rules: parts of an axis


def _slice(flow: Flow, node: Node, given: list[Axes]) -> Result:
    chosen = _axes_of(node, 3, "axes")
    if isinstance(chosen, Refusal):
        return chosen
    if chosen is None:
        starts = flow.size(given[1][0])[0] if len(given) > 1 else len(node.attrs["starts"])
        chosen = list(range(starts))
    return _take_part(flow, node, given[0], chosen)


def _split(flow: Flow, node: Node, given: list[Axes]) -> Result:
    return _take_part(flow, node, given[0], [int(node.attrs.get("axis", 0))])


def _take_part(flow: Flow, node: Node, axes: Axes, chosen: Sequence[int]) -> Result:
    made = [flow.fresh(t, reason(node, "takes a part of it")) for t in node.outputs]
    known = [m for m in made if m is not None]
    if len(known) < len(made):
        return Refusal("makes a tensor of unknown shape")
    split = {i % len(axes) for i in chosen}
    for i in split:
        pin(axes[i], reason(node, "splits it"))
    return [[m[i] if i in split else axis for i, axis in enumerate(axes)] for m in known]


def _concat(flow: Flow, node: Node, given: list[Axes]) -> Result:
    axis = int(node.attrs["axis"]) % len(given[0])
    rest = _broadcast([[[] if i == axis else a for i, a in enumerate(axes)] for axes in given])
    if isinstance(rest, Refusal):
        return rest
    for axes in given:
        pin(axes[axis], reason(node, "concatenates it"))
    total = np.array([flow.size(axes[axis]) for axes in given]).sum(0)
    rest[axis] = axis_of(tuple(int(n) for n in total), reason(node, "concatenates it"))
    return [rest]


def _shape(flow: Flow, node: Node, given: list[Axes]) -> Result:
    """The order of entries does not matter: only sizes are read."""
    made = flow.fresh(node.outputs[0], reason(node, "makes it"))
    return Refusal("makes a tensor of unknown shape") if made is None else [made]


def _axes_of(node: Node, index: int, attribute: str) -> list[int] | Refusal | None:
    """Axes from an attribute, or from an input as in later opsets; None where there are none."""
    if attribute in node.attrs:
        return [int(i) for i in node.attrs[attribute]]
    if len(node.inputs) <= index or not node.inputs[index].name:
        return None
    tensor = node.inputs[index]
    if not is_constant(tensor):
        return Refusal("computes its axes")
    return [int(i) for i in array(tensor).flat]


RULES: dict[str, Rule] = {
    **dict.fromkeys((*ELEMENTWISE, "Dropout"), _elementwise),
    **dict.fromkeys(NORMALIZATIONS, _normalize),
    **dict.fromkeys(REDUCTIONS, _reduce),
    "Attention": _attention,
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "LogSoftmax": _softmax,
    "LpNormalization": _softmax,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
