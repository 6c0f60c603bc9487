"""Rewrites a compiled model to emulate x86 without VNNI on processors with exact sums.

There ONNX Runtime adds neighbouring products of uint8 data by int8 weights in int16, which
saturates. The rewritten model has an exact int8 matrix multiplication, the effect of saturation
(``saturating_sums``), and then the operator's own arithmetic. It is derived from the optimized
graph (``session.write_optimized``), and must run with optimizations off, on a processor that adds
in int32 (not ``session.saturates``): otherwise sums would saturate twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import get_attribute_value

from qcompile.ir import MICROSOFT, Refusal, is_op
from qcompile.ir.model_io.external_data import Storage
from qcompile.ir.quantized_operators import (
    QuantizedOperator,
    byte_products,
    input_name,
    quantized_operator,
)
from qcompile.ir.subgraph import bodies
from qcompile.quant import Array
from qcompile.runtime.evaluation.int16_saturation import is_unspecified, label, unspecified
from qcompile.runtime.evaluation.saturating_convolutions import Convolution, Filters, saturated
from qcompile.runtime.evaluation.saturating_sums import (
    CHUNK,
    Fragment,
    Pairs,
    every_pair,
    excess,
    saturable,
)
from qcompile.runtime.evaluation.tensor_facts import TensorFacts, function_names

# If more than this share of the pairs can saturate, and more than CHUNK, a loop over all pairs is
# the smaller graph.
_FEW = 0.05
_DYNAMIC, _TO_FLOAT = (
    f"{MICROSOFT}.{op}" for op in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
)
_UNKNOWN = "the types of its operands are not known"


@dataclass(frozen=True)
class SaturatingForm:
    """A model with saturating sums; external weights are where the original model has them.

    emulated: nodes whose sums are saturated. left: nodes that may saturate but are unchanged, and
    why. Nodes whose sums never exceed int16 are in neither.
    """

    model: onnx.ModelProto
    emulated: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def saturating_form(model: onnx.ModelProto, storage: Storage | None = None) -> SaturatingForm:
    """A copy of a model with saturating sums; ``storage`` as from ``read_model``."""
    form = onnx.ModelProto()
    form.CopyFrom(model)
    own = function_names(form)
    facts = TensorFacts(form.graph, storage or Storage(), functions=own)
    nodes, emulated, left = list(form.graph.node), [], []
    del form.graph.node[:]
    for node in nodes:
        rewritten = _rewritten(node, facts)
        if isinstance(rewritten, Fragment):
            emulated.append(label(node))
            form.graph.node.extend(rewritten.nodes)
            form.graph.initializer.extend(rewritten.constants)
            continue
        form.graph.node.append(node)
        left += [] if rewritten is None else [(label(node), rewritten.reason)]
        left += _inside(node, facts)
    for function in form.functions:
        inner = TensorFacts(onnx.GraphProto(node=function.node), Storage(), functions=own)
        risky = (n for n in function.node if _rewritten(n, inner) is not None)
        left += [(label(n), f"it is in the function {function.name}") for n in risky]
    return SaturatingForm(form, tuple(emulated), tuple(left))


def _inside(node: onnx.NodeProto, facts: TensorFacts) -> Iterator[tuple[str, str]]:
    """Nodes of the bodies of an If, Loop or Scan that may saturate."""
    for body in bodies(node):
        inner = TensorFacts(body, facts.storage, facts)
        for one in body.node:
            if _rewritten(one, inner) is not None:
                yield label(one), f"it is in a body of {label(node)}"
            yield from _inside(one, inner)


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    found = (get_attribute_value(a) for a in node.attribute if a.name == name)
    return float(next(found, default))


def _rewritten(node: onnx.NodeProto, facts: TensorFacts) -> Fragment | Refusal | None:
    """The nodes that replace a node, why it is unchanged, or None where its sums are exact."""
    if is_unspecified(node, facts):
        return Refusal(unspecified(node))
    row = quantized_operator(node)
    products = [(a.names(node)[0], b.names(node)[0]) for a, b in byte_products(node)]
    if row is None or not products:
        return None
    if is_op(node, "ConvInteger"):
        [(filters, data)] = products
        mixed = facts.type(filters) != TensorProto.INT8 and facts.type(data) != TensorProto.UINT8
        return Refusal("int8 data by uint8 filters is not rebuilt") if mixed else None
    if row.kind == "convolution":
        return _convolution(node, row, facts)
    if row.kind in ("matmul", "gemm"):
        return _product(node, row, facts)
    risky = any(_may_saturate(weight, facts) for _, weight in products)
    return Refusal(f"{node.op_type} is not rebuilt") if risky else None


def _may_saturate(weight: str, facts: TensorFacts) -> bool:
    """False for constants without a pair (along the second last axis) that can exceed int16."""
    if facts.type(weight) not in (0, TensorProto.INT8):
        return False
    values = facts.values(weight)
    return values is None or len(saturable(_tall(values)).columns) > 0


def _tall(values: Array) -> Array:
    """A stack of matrices [..., inputs, outputs], or a vector, as [inputs, all]."""
    inputs = values[:, None] if values.ndim == 1 else np.moveaxis(values, -2, 0)
    return inputs.reshape(len(inputs), -1)


@dataclass(frozen=True)
class _Product:
    """Names of the tensors of an int8 matrix multiplication, "" where there is none.

    uint8 [..., rows, inputs] by int8 [..., inputs, outputs].
    """

    left: str
    right: str
    left_zero: str
    right_zero: str
    left_scale: str
    right_scale: str


def _product(
    node: onnx.NodeProto, row: QuantizedOperator, facts: TensorFacts
) -> Fragment | Refusal | None:
    both = zip(*(operand.names(node) for operand in row.operands), strict=True)
    (a, b), (a_scale, b_scale), (a_zero, b_zero) = both
    it = _Product(a, b, a_zero, b_zero, a_scale, b_scale)
    left, right = (facts.type(z) or facts.type(x) for x, z in _typed(it))
    left = int(TensorProto.UINT8) if row.operands[0].is_float else left
    if left == TensorProto.INT8 or right == TensorProto.UINT8:
        return None
    if not (left and right):
        return Refusal(_UNKNOWN)
    across = bool(_attribute(node, "transB", 0))
    weight = _weight(it.right, across, facts)
    if not isinstance(weight, _Weight):
        return weight
    f = Fragment(f"{label(node)}/saturating", facts.names)
    it = _matmul_operands(f, node, it, across)
    exact = f.add(
        "MatMulInteger", it.left, it.right, *_without_trailing_gaps(it.left_zero, it.right_zero)
    )
    total = _total(f, it, exact, weight)
    if is_op(node, _TO_FLOAT, _DYNAMIC):
        _to_float(f, node, it, (exact, total), facts.is_single(input_name(node, 2)))
    elif row.kind == "gemm":
        _gemm(f, node, row, it, total)
    elif row.result.scale is not None:
        _, scale, zero = row.result.names(node)
        _requantized(f, total, _multiplier(f, it, scale), zero)
    f.end(node.output[0])
    return f


def _typed(it: _Product) -> tuple[tuple[str, str], tuple[str, str]]:
    """The operands with their zero points, which are of the same types."""
    return (it.left, it.left_zero), (it.right, it.right_zero)


@dataclass(frozen=True)
class _Weight:
    """A right operand: its pairs that can saturate, None to compute all of them.

    inputs, outputs: shape of a constant weight.
    """

    pairs: Pairs | None = None
    inputs: int = 0
    outputs: int = 0


def _weight(right: str, across: bool, facts: TensorFacts) -> _Weight | Refusal | None:
    """The right operand; None where no pair can saturate. ``across``: it is [outputs, inputs]."""
    values = facts.values(right)
    if values is None:
        is_vector = len(facts.shape(right) or (0, 0)) == 1
        return Refusal("its right operand is a vector") if is_vector else _Weight()
    values = values.T if across else values
    pairs = saturable(_tall(values))
    if not len(pairs.columns):
        return None
    if values.ndim == 1:
        return Refusal("its right operand is a vector")
    return _Weight(_few(pairs, values.size // 2) if values.ndim == 2 else None, *values.shape[-2:])


def _few(pairs: Pairs, of: int) -> Pairs | None:
    """The pairs where they are few, else None."""
    return pairs if len(pairs.columns) <= max(CHUNK, _FEW * of) else None


def _matmul_operands(f: Fragment, node: onnx.NodeProto, it: _Product, across: bool) -> _Product:
    """The operands quantized and transposed as MatMulInteger takes them."""
    if is_op(node, _DYNAMIC):
        left, scale, zero = f.add_all("DynamicQuantizeLinear", (it.left,), 3)
        return replace(it, left=left, left_scale=scale, left_zero=zero)
    if _attribute(node, "transA", 0):
        it = replace(it, left=f.add("Transpose", it.left, perm=[1, 0]))
    return replace(it, right=f.add("Transpose", it.right, perm=[1, 0])) if across else it


def _without_trailing_gaps(*inputs: str) -> tuple[str, ...]:
    """Optional inputs without the missing ones at the end."""
    return inputs if not inputs or inputs[-1] else _without_trailing_gaps(*inputs[:-1])


def _total(f: Fragment, it: _Product, exact: str, weight: _Weight) -> str:
    """The saturated matrix multiplication: int32, in the shape of the exact one."""
    if weight.pairs is None:
        return every_pair(f, exact, it.left, it.right)
    rows = f.add("Reshape", it.left, f.integers(-1, weight.inputs))
    columns = f.add("Transpose", rows, perm=[1, 0])
    more = f.add("Transpose", excess(f, columns, weight.pairs, weight.outputs), perm=[1, 0])
    return f.add("Add", exact, f.add("Reshape", more, f.add("Shape", exact)))


def _to_float(
    f: Fragment, node: onnx.NodeProto, it: _Product, sums: tuple[str, str], single: bool
) -> str:
    """The rest of MatMulIntegerToFloat for its ``sums``, (exact, saturated): sum · scale + bias.

    With a scale per row, or one not known to be ``single``, it is float(sum) · right · left. ONNX
    Runtime then scales the bias by left too, so with a bias the operator itself runs, and the
    effect of saturation is added to its result.
    """
    exact, total = sums
    bias = input_name(node, 4 if is_op(node, _DYNAMIC) else 6)
    if single or is_op(node, _DYNAMIC):
        scale = f.add("Mul", it.left_scale, it.right_scale)
        scaled = f.add("Mul", f.cast(total, TensorProto.FLOAT), scale)
        return f.add("Add", scaled, bias) if bias else scaled
    whole = f.add(node.op_type, *node.input, domain=node.domain) if bias else ""
    more = f.cast(f.add("Sub", total, exact) if bias else total, TensorProto.FLOAT)
    scaled = f.add("Mul", f.add("Mul", more, it.right_scale), it.left_scale)
    return f.add("Add", whole, scaled) if bias else scaled


def _multiplier(f: Fragment, it: _Product, scale: str) -> str:
    """The factor by which MLAS multiplies sums, in its order: left · right / output."""
    return f.add("Div", f.add("Mul", it.left_scale, it.right_scale), scale)


def _requantized(f: Fragment, sums: str, multiplier: str, zero: str) -> str:
    """uint8 as in MlasRequantizeOutput: round_half_even(float(sum) · multiplier) + zero."""
    scaled = f.add("Mul", f.cast(sums, TensorProto.FLOAT), multiplier)
    shifted = f.add("Add", f.add("Round", scaled), f.cast(zero, TensorProto.FLOAT))
    low, high = (f.constant(np.array(limit, np.float32)) for limit in (0, 255))
    return f.cast(f.add("Clip", shifted, low, high), TensorProto.UINT8)


def _gemm(
    f: Fragment, node: onnx.NodeProto, row: QuantizedOperator, it: _Product, sums: str
) -> str:
    """The rest of QGemm: sums + bias, scaled; as uint8 where there is a zero point.

    Its scales are multiplied as quant_gemm.cc does: alpha · left · right, then / output.
    """
    bias, (_, scale, zero) = input_name(node, row.bias), row.result.names(node)
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


def _convolution(
    node: onnx.NodeProto, row: QuantizedOperator, facts: TensorFacts
) -> Fragment | Refusal | None:
    """A QLinearConv: uint8 data by int8 filters."""
    (x, x_scale, x_zero), (w, w_scale, w_zero) = (o.names(node) for o in row.operands)
    bias, (_, scale, zero) = input_name(node, row.bias), row.result.names(node)
    left, right = facts.type(x_zero) or facts.type(x), facts.type(w_zero) or facts.type(w)
    if left == TensorProto.INT8 or right == TensorProto.UINT8:
        return None
    if not (left and right):
        return Refusal(_UNKNOWN)
    values = facts.values(w)
    if values is None:
        return Refusal("its filters are not constant")
    filters = Filters(values, int(_attribute(node, "group", 1)))
    pairs = filters.pairs()
    if filters.depthwise or not len(pairs.columns):
        return None
    f = Fragment(f"{label(node)}/saturating", facts.names)
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
