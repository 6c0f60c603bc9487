"""A compiled model in the form that computes, with exact sums, what x86 without VNNI computes.

There ONNX Runtime adds neighbouring products of uint8 data by int8 weights in int16, which
saturates. The form has such products as an exact integer product, what saturation adds to it
(``saturating_sums``), and the operator's own arithmetic afterwards. It is made of the graph that
ONNX Runtime really runs (``session.write_optimized``), runs with optimizations off, and only on a
processor that adds in int32 itself (``session.saturates``): one that saturates would do it twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import get_attribute_value

from qcompile.ir.model_io.element_types import element_types
from qcompile.ir.model_io.external_data import Storage, values_of
from qcompile.ir.subgraph import bodies
from qcompile.quant import Array
from qcompile.runtime.evaluation.saturating_convolutions import Convolution, Filters, saturated
from qcompile.runtime.evaluation.saturating_sums import (
    CHUNK,
    Fragment,
    Pairs,
    every_pair,
    excess,
    saturable,
)

MICROSOFT = "com.microsoft"
# Where more of all pairs can saturate, and more than a chunk of them, a loop over every pair is the
# smaller graph.
_FEW = 0.05
_DYNAMIC, _TO_FLOAT = "DynamicQuantizeMatMul", "MatMulIntegerToFloat"
# Slots of the operands, their zero points and their scales: left, right each.
_SLOTS: dict[str, tuple[int | None, ...]] = {
    "MatMulInteger": (0, 1, 2, 3, None, None),
    _TO_FLOAT: (0, 1, 4, 5, 2, 3),
    _DYNAMIC: (0, 1, None, 3, None, 2),
    "QLinearMatMul": (0, 3, 2, 5, 1, 4),
    "QGemm": (0, 3, 2, 5, 1, 4),
}
_UNKNOWN = "the types of its operands are not known"
# Operators whose products are not rebuilt, by the slots of their weights.
_OTHERS = {"QAttention": (1,), "DynamicQuantizeLSTM": (1, 2)}


@dataclass(frozen=True)
class SaturatingForm:
    """A model with saturating sums; its weights lie where those of the model that it is of do.

    emulated: nodes whose sums are saturated. left: nodes that may saturate and are as they were,
    and why. Nodes whose sums never leave int16 are in neither.
    """

    model: onnx.ModelProto
    emulated: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def saturating_form(model: onnx.ModelProto, storage: Storage | None = None) -> SaturatingForm:
    """The form of a model; ``storage`` as ``from_proto.read`` has it."""
    form = onnx.ModelProto()
    form.CopyFrom(model)
    facts = _Facts(form.graph, storage or Storage())
    nodes, emulated, left = list(form.graph.node), [], []
    del form.graph.node[:]
    for node in nodes:
        made = _rewritten(node, facts)
        if isinstance(made, Fragment):
            emulated.append(_label(node))
            form.graph.node.extend(made.nodes)
            form.graph.initializer.extend(made.constants)
            continue
        form.graph.node.append(node)
        left += [] if made is None else [(_label(node), made)]
        left += _inside(node, facts)
    for function in form.functions:
        inner = _Facts(onnx.GraphProto(node=function.node), Storage())
        risky = (n for n in function.node if _rewritten(n, inner) is not None)
        left += [(_label(n), f"it is in the function {function.name}") for n in risky]
    return SaturatingForm(form, tuple(emulated), tuple(left))


def _inside(node: onnx.NodeProto, facts: _Facts) -> Iterator[tuple[str, str]]:
    """Nodes of the bodies of an If, Loop or Scan that may saturate."""
    for body in bodies(node):
        inner = _Facts(body, facts.storage, facts)
        for one in body.node:
            if _rewritten(one, inner) is not None:
                yield _label(one), f"it is in a body of {_label(node)}"
            yield from _inside(one, inner)


def _label(node: onnx.NodeProto) -> str:
    return str(node.name or next(filter(None, node.output), ""))


class _Facts:
    """What is known of the tensors of a graph before it runs; ``outer``: of the graph around it."""

    def __init__(
        self, graph: onnx.GraphProto, storage: Storage, outer: _Facts | None = None
    ) -> None:
        self.storage, self._outer = storage, outer
        self._constants = {t.name: t for t in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        typed = (*graph.value_info, *graph.input, *graph.output)
        self._kinds = element_types(graph)
        self._types = {v.name: v.type.tensor_type for v in typed}
        self.taken = set(_names(graph))

    def values(self, name: str) -> Array | None:
        """Those of a constant, None of other tensors."""
        if name in self._constants:
            return values_of(self._constants[name], self.storage)
        return self._outer.values(name) if self._outer else None

    def kind(self, name: str) -> int:
        """The element type, 0 where unknown."""
        return self._kinds.get(name) or (self._outer.kind(name) if self._outer else 0)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Sizes, 0 where unknown; None where even their number is."""
        if name in self._constants:
            return tuple(self._constants[name].dims)
        known = self._types.get(name)
        if known is None or not known.HasField("shape"):
            return self._outer.shape(name) if self._outer else None
        return tuple(dim.dim_value for dim in known.shape.dim)

    def is_single(self, name: str) -> bool:
        """True where the tensor is a scalar, or a vector of one element, for sure."""
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "DynamicQuantizeLinear":
            return True  # the scale, or the zero point
        return self.shape(name) in ((), (1,))


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name in a graph and in the bodies of its nodes."""
    yield from (t.name for t in graph.initializer)
    yield from (v.name for v in (*graph.input, *graph.output, *graph.value_info))
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for body in bodies(node):
            yield from _names(body)


def _input(node: onnx.NodeProto, slot: int | None) -> str:
    """The name of an input, "" where it is missing."""
    return "" if slot is None or slot >= len(node.input) else str(node.input[slot])


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    found = (get_attribute_value(a) for a in node.attribute if a.name == name)
    return float(next(found, default))


def _rewritten(node: onnx.NodeProto, facts: _Facts) -> Fragment | str | None:
    """What takes a node's place; why it is left as it is; None where its sums are exact."""
    if node.domain not in ("", MICROSOFT):
        return None
    if node.op_type in _SLOTS:
        return _product(node, facts)
    if node.op_type == "QLinearConv":
        return _convolution(node, facts)
    if node.op_type == "ConvInteger":
        # The runtime has the filters left and the data right.
        kinds = facts.kind(node.input[0]), facts.kind(node.input[1])
        mixed = kinds[0] != TensorProto.UINT8 and kinds[1] != TensorProto.INT8
        return "int8 data by uint8 filters is not rebuilt" if mixed else None
    if any(_may_saturate(_input(node, slot), facts) for slot in _OTHERS.get(node.op_type, ())):
        return f"{node.op_type} is not rebuilt"
    return None


def _may_saturate(weight: str, facts: _Facts) -> bool:
    """True but for constants of which no pair along the last axis but one can leave int16."""
    if facts.kind(weight) not in (0, TensorProto.INT8):
        return False
    values = facts.values(weight)
    return values is None or len(saturable(_tall(values)).columns) > 0


def _tall(values: Array) -> Array:
    """A stack of matrices [..., inputs, outputs], or a vector, as [inputs, all]."""
    inputs = values[:, None] if values.ndim == 1 else np.moveaxis(values, -2, 0)
    return inputs.reshape(len(inputs), -1)


@dataclass(frozen=True)
class _Product:
    """A product of matrices: uint8 [..., rows, inputs] by int8 [..., inputs, outputs].

    The names of its tensors, "" where it has none.
    """

    left: str
    right: str
    left_zero: str
    right_zero: str
    left_scale: str
    right_scale: str


def _product(node: onnx.NodeProto, facts: _Facts) -> Fragment | str | None:
    it = _Product(*(_input(node, slot) for slot in _SLOTS[node.op_type]))
    left, right = (facts.kind(z) or facts.kind(x) for x, z in _typed(it))
    left = int(TensorProto.UINT8) if node.op_type == _DYNAMIC else left
    if left == TensorProto.INT8 or right == TensorProto.UINT8:
        return None
    if not (left and right):
        return _UNKNOWN
    across = bool(_attribute(node, "transB", 0))
    weight = _weight(it.right, across, facts)
    if not isinstance(weight, _Weight):
        return weight
    f = Fragment(f"{_label(node)}/saturating", facts.taken)
    it = _plain(f, node, it, across)
    exact = f.add("MatMulInteger", it.left, it.right, *_given(it.left_zero, it.right_zero))
    total = _total(f, it, exact, weight)
    if node.op_type in (_TO_FLOAT, _DYNAMIC):
        _to_float(f, node, it, (exact, total), facts.is_single(_input(node, 2)))
    elif node.op_type == "QLinearMatMul":
        _requantized(f, total, _multiplier(f, it, _input(node, 6)), _input(node, 7))
    elif node.op_type == "QGemm":
        _gemm(f, node, it, total)
    f.end(node.output[0])
    return f


def _typed(it: _Product) -> tuple[tuple[str, str], tuple[str, str]]:
    """The operands with their zero points, which are of the same types."""
    return (it.left, it.left_zero), (it.right, it.right_zero)


@dataclass(frozen=True)
class _Weight:
    """How a right operand's pairs are looked at: those that can saturate, or None for all.

    outputs: columns of a constant weight.
    """

    pairs: Pairs | None = None
    inputs: int = 0
    outputs: int = 0


def _weight(right: str, across: bool, facts: _Facts) -> _Weight | str | None:
    """``across``: the constant is [outputs, inputs]. None where no pair can saturate."""
    values = facts.values(right)
    if values is None:
        is_vector = len(facts.shape(right) or (0, 0)) == 1
        return "its right operand is a vector" if is_vector else _Weight()
    values = values.T if across else values
    pairs = saturable(_tall(values))
    if not len(pairs.columns):
        return None
    if values.ndim == 1:
        return "its right operand is a vector"
    return _Weight(_few(pairs, values.size // 2) if values.ndim == 2 else None, *values.shape[-2:])


def _few(pairs: Pairs, of: int) -> Pairs | None:
    """The pairs where they are few; None where all are to be looked at."""
    return pairs if len(pairs.columns) <= max(CHUNK, _FEW * of) else None


def _plain(f: Fragment, node: onnx.NodeProto, it: _Product, across: bool) -> _Product:
    """The operands as MatMulInteger takes them."""
    if node.op_type == _DYNAMIC:
        left, scale, zero = f.add_all("DynamicQuantizeLinear", (it.left,), 3)
        return replace(it, left=left, left_scale=scale, left_zero=zero)
    if _attribute(node, "transA", 0):
        it = replace(it, left=f.add("Transpose", it.left, perm=[1, 0]))
    return replace(it, right=f.add("Transpose", it.right, perm=[1, 0])) if across else it


def _given(*inputs: str) -> tuple[str, ...]:
    """Optional inputs without the missing ones at the end."""
    return inputs if not inputs or inputs[-1] else _given(*inputs[:-1])


def _total(f: Fragment, it: _Product, exact: str, weight: _Weight) -> str:
    """The saturated product: int32, in the shape of the exact one."""
    if weight.pairs is None:
        return every_pair(f, exact, it.left, it.right)
    rows = f.add("Reshape", it.left, f.integers(-1, weight.inputs))
    columns = f.add("Transpose", rows, perm=[1, 0])
    more = f.add("Transpose", excess(f, columns, weight.pairs, weight.outputs), perm=[1, 0])
    return f.add("Add", exact, f.add("Reshape", more, f.add("Shape", exact)))


def _to_float(
    f: Fragment, node: onnx.NodeProto, it: _Product, sums: tuple[str, str], single: bool
) -> str:
    """MatMulIntegerToFloat after its sums, exact and saturated: float(sum) · scale + bias.

    With a scale for each row, or one not known to be ``single``, it is float(sum) · right · left.
    ONNX Runtime then scales a bias by left too, so the operator itself runs where there is one, and
    what saturation adds to the sums is added to what it gives.
    """
    exact, total = sums
    bias = _input(node, 4 if node.op_type == _DYNAMIC else 6)
    if single or node.op_type == _DYNAMIC:
        scale = f.add("Mul", it.left_scale, it.right_scale)
        scaled = f.add("Mul", f.cast(total, TensorProto.FLOAT), scale)
        return f.add("Add", scaled, bias) if bias else scaled
    whole = f.add(node.op_type, *node.input, domain=node.domain) if bias else ""
    more = f.cast(f.add("Sub", total, exact) if bias else total, TensorProto.FLOAT)
    scaled = f.add("Mul", f.add("Mul", more, it.right_scale), it.left_scale)
    return f.add("Add", whole, scaled) if bias else scaled


def _multiplier(f: Fragment, it: _Product, scale: str) -> str:
    """What MLAS multiplies sums by, in its order: left · right / output."""
    return f.add("Div", f.add("Mul", it.left_scale, it.right_scale), scale)


def _requantized(f: Fragment, sums: str, multiplier: str, zero: str) -> str:
    """uint8 as MlasRequantizeOutput makes it: round_half_even(float(sum) · multiplier) + zero."""
    scaled = f.add("Mul", f.cast(sums, TensorProto.FLOAT), multiplier)
    shifted = f.add("Add", f.add("Round", scaled), f.cast(zero, TensorProto.FLOAT))
    low, high = (f.constant(np.array(limit, np.float32)) for limit in (0, 255))
    return f.cast(f.add("Clip", shifted, low, high), TensorProto.UINT8)


def _gemm(f: Fragment, node: onnx.NodeProto, it: _Product, sums: str) -> str:
    """QGemm after its sums: alpha (A · B + C) in integers, scaled, and uint8 where a zero is given.

    Its scales are multiplied as quant_gemm.cc does: alpha · left · right, then / output.
    """
    bias, scale, zero = (_input(node, slot) for slot in (6, 7, 8))
    alpha = _attribute(node, "alpha", 1)
    if alpha != 1:
        first = f.add("Mul", f.constant(np.array(alpha, np.float32)), it.left_scale)
        it = replace(it, left_scale=first)
    multiplier = f.add("Mul", it.left_scale, it.right_scale)
    multiplier = f.add("Div", multiplier, scale) if scale else multiplier
    sums = f.add("Add", sums, bias) if bias else sums
    if zero:
        return _requantized(f, sums, multiplier, zero)
    return f.add("Mul", f.cast(sums, TensorProto.FLOAT), multiplier)


def _convolution(node: onnx.NodeProto, facts: _Facts) -> Fragment | str | None:
    """A QLinearConv: uint8 data by int8 filters; its inputs are x, its scale and zero, w, and so
    on, the output's scale and zero, and an int32 bias."""
    x, x_scale, x_zero, w, w_scale, w_zero, scale, zero, bias = (_input(node, i) for i in range(9))
    left, right = facts.kind(x_zero) or facts.kind(x), facts.kind(w_zero) or facts.kind(w)
    if left == TensorProto.INT8 or right == TensorProto.UINT8:
        return None
    if not (left and right):
        return _UNKNOWN
    values = facts.values(w)
    if values is None:
        return "its filters are not constant"
    filters = Filters(values, int(_attribute(node, "group", 1)))
    pairs = filters.pairs()
    if filters.depthwise or not len(pairs.columns):
        return None
    f = Fragment(f"{_label(node)}/saturating", facts.taken)
    space, last = values.ndim - 2, bool(_attribute(node, "channels_last", 0))
    if last:
        x = f.add("Transpose", x, perm=[0, space + 1, *range(1, space + 1)])
    it = Convolution(node, filters, x, x_zero, w, w_zero)
    sums = saturated(f, it, _few(pairs, values.size // 2))
    each = f.integers(-1, *[1] * space)
    if bias:
        sums = f.add("Add", sums, f.add("Reshape", bias, each))
    multiplier = f.add("Div", f.add("Mul", x_scale, w_scale), scale)
    made = _requantized(f, sums, f.add("Reshape", multiplier, each), zero)
    if last:
        f.add("Transpose", made, perm=[0, *range(2, space + 2), 1])
    f.end(node.output[0])
    return f
