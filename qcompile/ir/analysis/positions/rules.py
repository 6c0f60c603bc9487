"""Which entries of its operands an operator needs for some entries of one axis of its result.

One rule per operator. A rule maps an axis of the result to an axis of each operand: entry i there
depends on entry i of the operand's axis only. ``WHOLE`` is an operand that is needed whole, such as
keys and values. A Refusal says why all entries are needed: the operator combines them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qcompile.ir import Node, Refusal, Tensor, array, is_constant, op_name
from qcompile.ir.analysis.positions.sizes import Size, Sizes, product
from qcompile.ir.operators import (
    ELEMENTWISE,
    MATMULS,
    NORMALIZATIONS,
    REDUCTIONS,
    RESHAPES,
    SKIP_NORMALIZATIONS,
)


@dataclass(frozen=True)
class Axis:
    """Positions within a tensor: axis ``index`` has ``before`` x ``size`` x ``after`` entries.

    ``before`` and ``after`` are 1 unless a Reshape merged axes, as in [batch * sequence, channels].
    ``spread``: the operand has one entry there, or lacks the axis (then ``index`` is negative).
    """

    index: int
    size: Size
    before: Size
    after: Size
    spread: bool = False

    @property
    def merged(self) -> bool:
        return any(n != 1 for n in (*self.before, *self.after))

    def at(self, index: int, *, spread: bool = False) -> Axis:
        """The same positions along another axis."""
        return Axis(index, self.size, self.before, self.after, spread)

    @property
    def length(self) -> Size:
        """Entries of the whole axis."""
        return product([self.before, self.size, self.after], len(self.size))


WHOLE = None
# An axis for each operand, ``WHOLE`` for one that is needed whole.
Mapped: TypeAlias = list[Axis | None]
Rule: TypeAlias = Callable[[Sizes, Node, Axis], Mapped | Refusal]


def simple_axis(index: int, size: Size) -> Axis:
    """An axis that consists of the positions alone."""
    one = (1,) * len(size)
    return Axis(index, size, one, one)


def mapped(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    """What a node needs of its operands for some entries of ``axis`` of its results."""
    rule = RULES.get(op_name(node))
    if rule is None:
        return Refusal("it may combine positions")
    if any(sizes.of(t) is None for t in (*node.inputs, *node.outputs[:1]) if t.name):
        return Refusal("the sizes of its operands or results are unknown")
    return rule(sizes, node, axis)


def _dims(sizes: Sizes, tensor: Tensor) -> tuple[Size, ...]:
    return sizes.of(tensor) or ()


def _only(node: Node, axis: Axis, slot: int = 0) -> Mapped:
    """The axis for one operand; all others are needed whole."""
    return [axis if i == slot else WHOLE for i in range(len(node.inputs))]


def _aligned(sizes: Sizes, tensor: Tensor, axis: Axis, rank: int) -> Axis | Refusal:
    """The axis of an operand that is broadcast to a result of this rank."""
    dims = _dims(sizes, tensor)
    index = axis.index - (rank - len(dims))
    if index >= 0 and dims[index] == axis.length:
        return axis.at(index)
    if index < 0 or all(n == 1 for n in dims[index]):
        return axis.at(index, spread=True)
    return Refusal(f"{tensor.name!r} may be broadcast along the axis, or not")


def _each_aligned(
    sizes: Sizes, operands: Sequence[Tensor], axis: Axis, rank: int
) -> Mapped | Refusal:
    found: Mapped = []
    for tensor in operands:
        own = _aligned(sizes, tensor, axis, rank) if tensor.name else WHOLE
        if isinstance(own, Refusal):
            return own
        found.append(own)
    return found


def _elementwise(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    return _each_aligned(sizes, node.inputs, axis, len(_dims(sizes, node.outputs[0])))


def _quantize(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    scale = _dims(sizes, node.inputs[1])
    rank = len(_dims(sizes, node.inputs[0]))
    single = all(n == 1 for size in scale for n in size)
    if single or (len(scale) == 1 and int(node.attrs.get("axis", 1)) % rank != axis.index):
        return _only(node, axis)
    return Refusal("it has scales along the axis, or blocks")


def _normalize(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    rank = len(_dims(sizes, node.inputs[0]))
    start = int(node.attrs.get("axis", -1)) % rank
    if axis.index >= start:
        return Refusal("it normalizes over the positions")
    if any(len(_dims(sizes, t)) > rank - start for t in node.inputs[1:] if t.name):
        return Refusal("its scale or bias has more than the normalized axes")
    return _only(node, axis)


def _softmax(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    rank = len(_dims(sizes, node.inputs[0]))
    over = int(node.attrs.get("axis", -1 if sizes.graph.opset >= 13 else 1)) % rank
    flattens = sizes.graph.opset < 13 and over != rank - 1
    if over == axis.index or flattens:
        return Refusal("it normalizes over the positions")
    return _only(node, axis)


def _matmul(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    left, right = (len(_dims(sizes, t)) for t in node.inputs[:2])
    rank = len(_dims(sizes, node.outputs[0]))
    if min(left, right) < 2 or any(k.startswith("trans") and v for k, v in node.attrs.items()):
        return Refusal("it multiplies vectors or transposed matrices")
    if axis.index == rank - 2:
        return _only(node, axis.at(left - 2))
    if axis.index == rank - 1:
        if is_constant(node.inputs[1]):
            return Refusal("the axis has the outputs of a linear layer")
        return _only(node, axis.at(right - 1), 1)
    return _each_aligned(sizes, node.inputs, axis, rank)


def _gemm(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    if axis.index != 0:
        return Refusal("the axis has the outputs of a linear layer")
    data = axis.at(1 if node.attrs.get("transA", 0) else 0)
    bias = _each_aligned(sizes, node.inputs[2:], axis, 2)
    if isinstance(bias, Refusal):
        return bias
    return [data, WHOLE, *bias]


def _attention(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    """ONNX Attention-23 without a cache: [batch, length, channels] or [batch, heads, length,
    channels]."""
    rank = len(_dims(sizes, node.inputs[0]))
    if node.attrs.get("is_causal", 0):
        return Refusal("it masks by the position of the query (is_causal)")
    if any(t.name for t in (*node.inputs[4:], *node.outputs[1:])):
        return Refusal("it has past keys or further results")
    if axis.index not in (0, rank - 2):
        return Refusal("the axis has heads or channels")
    found: Mapped = [axis, WHOLE, WHOLE] if axis.index else [axis, axis, axis]
    for mask in node.inputs[3:4]:
        own = _aligned(sizes, mask, axis.at(2 if axis.index else 0), 4) if mask.name else WHOLE
        if isinstance(own, Refusal):
            return own
        found.append(own)
    return found


def _multi_head_attention(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    """Of [batch, length, channels], with a mask of the keys and one that is added to the scores."""
    if node.attrs.get("unidirectional", 0):
        return Refusal("it masks by the position of the query (unidirectional)")
    if any(t.name for t in (*node.inputs[6:], *node.outputs[1:])):
        return Refusal("it has past keys or further results")
    query, *_, padding, bias = [*node.inputs, *[None] * 6][:6]
    if axis.index > 1 or len(_dims(sizes, query)) != 3:
        return Refusal("the axis has heads or channels")
    found: Mapped = [axis, WHOLE, WHOLE, WHOLE] if axis.index else [axis, axis, axis, WHOLE]
    if padding is not None and padding.name and len(_dims(sizes, padding)) != 2:
        return Refusal("its mask has lengths, or differs from query to query")
    found.append(WHOLE if axis.index else axis)
    if bias is not None and bias.name:
        own = _aligned(sizes, bias, axis.at(2 if axis.index else 0), 4)
        if isinstance(own, Refusal):
            return own
        found.append(own)
    return found[: len(node.inputs)]


def _packed_attention(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    return Refusal("it computes queries together with keys and values")


def _skip_normalize(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    rank = len(_dims(sizes, node.inputs[0]))
    if axis.index == rank - 1 or any(t.name for t in node.outputs[1:3]):
        return Refusal("it normalizes over the positions")
    found = _each_aligned(sizes, node.inputs[:2], axis, rank)
    return found if isinstance(found, Refusal) else [*found, *[WHOLE] * (len(node.inputs) - 2)]


def _transpose(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    perm = node.attrs.get("perm") or range(len(_dims(sizes, node.inputs[0])))[::-1]
    return [axis.at(int(perm[axis.index]))]


def _reshape(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    """The axis of the input with the same values, in the same order of memory."""
    probes = len(axis.size)
    made, read = _dims(sizes, node.outputs[0]), _dims(sizes, node.inputs[0])
    ahead = product([*made[: axis.index], axis.before], probes)
    for index, length in enumerate(read):
        start = product(read[:index], probes)
        own = _located(ahead, axis.size, start, length)
        if own is not None:
            return _only(node, Axis(index, axis.size, *own))
    return Refusal("it splits the positions")


def _located(ahead: Size, size: Size, start: Size, length: Size) -> tuple[Size, Size] | None:
    """How many entries are before and after the positions within one axis, None if they are in
    another one. ``ahead``: entries before the positions, ``start``: before the axis."""
    before, after = [], []
    for lead, count, first, whole in zip(ahead, size, start, length, strict=True):
        if first == 0 or lead % first or lead // first == 0 or whole % (lead // first * count):
            return None
        before.append(lead // first)
        after.append(whole // (lead // first * count))
    return tuple(before), tuple(after)


def _squeeze(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    named = "axes" in node.attrs or (len(node.inputs) > 1 and node.inputs[1].name)
    return _reshape(sizes, node, axis) if named else Refusal("it removes every axis of size 1")


def _gather(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    data, indices = (len(_dims(sizes, t)) for t in node.inputs)
    over = int(node.attrs.get("axis", 0)) % data
    if axis.index < over:
        return [axis, WHOLE]
    if axis.index < over + indices:
        return [WHOLE, axis.at(axis.index - over)]
    return [axis.at(axis.index - indices + 1), WHOLE]


def _gather_elements(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    data = _dims(sizes, node.inputs[0])
    if int(node.attrs.get("axis", 0)) % len(data) == axis.index:
        return [WHOLE, axis]
    if data[axis.index] != axis.length:
        return Refusal("its indices are fewer than its data")
    return [axis, axis]


def _slice(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    rank = len(_dims(sizes, node.inputs[0]))
    axes = _constant_axes(node, 3, range(rank))
    if axes is None or axis.index in {i % rank for i in axes}:
        return Refusal("it selects positions itself")
    return _only(node, axis)


def _along(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    """Split and Concat."""
    rank = len(_dims(sizes, node.inputs[0]))
    if int(node.attrs.get("axis", 0)) % rank == axis.index:
        return Refusal("it splits or joins the positions")
    return [axis] * len(node.inputs) if op_name(node) == "Concat" else _only(node, axis)


def _reduce(sizes: Sizes, node: Node, axis: Axis) -> Mapped | Refusal:
    rank = len(_dims(sizes, node.inputs[0]))
    if op_name(node) in ("ArgMax", "ArgMin"):
        axes: Sequence[int] | None = [int(node.attrs.get("axis", 0))]
    else:
        axes = _constant_axes(node, 1, range(rank))
    if axes is None:
        return Refusal("it computes its axes")
    gone = {i % rank for i in axes}
    kept = [i for i in range(rank) if node.attrs.get("keepdims", 1) or i not in gone]
    if kept[axis.index] in gone:
        return Refusal("it reduces the positions")
    return _only(node, axis.at(kept[axis.index]))


def _constant_axes(node: Node, slot: int, default: Sequence[int]) -> Sequence[int] | None:
    """Axes from the attribute or from an operand; None where they are computed."""
    if "axes" in node.attrs:
        return [int(i) for i in node.attrs["axes"]]
    if len(node.inputs) <= slot or not node.inputs[slot].name:
        return default
    if not is_constant(node.inputs[slot]):
        return None
    return [int(i) for i in array(node.inputs[slot]).flat]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(NORMALIZATIONS, _normalize),
    **dict.fromkeys((*REDUCTIONS, "ArgMax", "ArgMin"), _reduce),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys(SKIP_NORMALIZATIONS, _skip_normalize),
    "Attention": _attention,
    "com.microsoft.Attention": _packed_attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "Concat": _along,
    "DequantizeLinear": _quantize,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "LogSoftmax": _softmax,
    "LpNormalization": _softmax,
    "QuantizeLinear": _quantize,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _along,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
}
