"""Counts int16 saturation in a compiled model, which changes outputs on x86 without VNNI.

There neighbouring products a[2i] w[2i] + a[2i+1] w[2i+1] of uint8 by int8 are added in int16, which
saturates (vpmaddubsw); other processors add in int32. For each int8 matrix multiplication: how many
pairs of weights can exceed int16 for some input (255 is the largest activation), and how many sums
did on real inputs. Source: MLAS, QgemmU8S8KernelAvx2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import onnx

from qcompile.ir import MICROSOFT, is_op
from qcompile.ir.model_io.external_data import Storage
from qcompile.ir.operators import MATMULS, is_onnx_domain, op_name
from qcompile.ir.quantized_operators import QUANTIZED, byte_products, quantized_operator
from qcompile.ir.subgraph import bodies
from qcompile.quant import PAIR_SUM, Array, worst_sums
from qcompile.quant.weight_rounding import pairs, summed_first
from qcompile.runtime.evaluation.tensor_facts import TensorFacts, function_names

INT8, UINT8 = int(onnx.TensorProto.INT8), int(onnx.TensorProto.UINT8)
LOW, HIGH = -(1 << 15), (1 << 15) - 1
_LARGEST = 255
_ROWS = 256  # rows per linear that are checked, evenly spaced
_BATCHES = 16  # matrices of a stack that are checked
_CHUNK = 1 << 14  # pairs at a time: int32 sums of all rows are 16 MB
_CONVOLUTIONS = ("ConvInteger", "QLinearConv", f"{MICROSOFT}.QLinearConv")
_FLOAT_CONVOLUTIONS = ("Conv", f"{MICROSOFT}.FusedConv")
_FUSED_MATMUL = f"{MICROSOFT}.FusedMatMul"
_FLOAT_MATMULS = (*MATMULS, "Gemm", f"{MICROSOFT}.FusedGemm")
# Multiplies quantized weights, but no source says in how many bits on each processor.
_UNSPECIFIED = (f"{MICROSOFT}.QMoE",)
_COMPUTED = "its int8 operand is computed, so that any value is possible"
_FUSIBLE = "this version of ONNX Runtime computes it in float, another may fuse its Q/DQ nodes"


@dataclass(frozen=True)
class IntegerProduct:
    """An int8 matrix multiplication.

    ``weight``: int8 [inputs, outputs], None where the right operand is computed too. ``left`` and
    ``right``: names of the operands, ``left`` "" where its values cannot be observed. ``largest``:
    bound of the magnitude of a right operand that is computed, or added in an unknown order.
    ``reason``: why it is not known how, or whether, its products are added in int16.
    """

    node: str
    left: str
    right: str
    weight: Array | None
    largest: int = 128
    reason: str = ""


@dataclass(frozen=True)
class Saturation:
    """One node: weight pairs that can saturate, of all pairs; sums that did, of all checked."""

    node: str
    can: int
    pairs: int
    did: int | None = None
    sums: int = 0
    reason: Annotated[str, "why no better bound is known; empty where pairs of weights tell"] = ""


def exact_on_all(found: list[Saturation]) -> bool:
    """True where no sum can saturate, so that outputs are the same on all processors."""
    return not any(s.can for s in found)


def linears(
    model: onnx.ModelProto, storage: Storage | None = None, *, unoptimized: str = ""
) -> Iterator[IntegerProduct]:
    """The int8 matrix multiplications of a model as ONNX Runtime runs it (``write_optimized``).

    Those in subgraphs come after the node with the subgraph. ``storage`` as from ``read_model``;
    weights in files are views. ``unoptimized``: why this is the model as written instead, so that
    other operators may be fused to int8 matrix multiplications.
    """
    if unoptimized and has_bytes(model):
        yield IntegerProduct("the model", "", "", None, reason=unoptimized)
    own = function_names(model)
    facts = TensorFacts(model.graph, storage or Storage(), functions=own)
    yield from _of_graph(model.graph, facts)
    for function in model.functions:
        inner = onnx.GraphProto(node=function.node)
        yield from _of_graph(inner, TensorFacts(inner, Storage(), functions=own), seen=False)


def has_bytes(model: onnx.ModelProto) -> bool:
    """True where any operator, also in a body or a function, reads or makes 8-bit integers."""
    graphs = [model.graph, *(onnx.GraphProto(node=f.node) for f in model.functions)]
    return any(_has_bytes(graph, TensorFacts(graph, Storage())) for graph in graphs)


def _has_bytes(graph: onnx.GraphProto, facts: TensorFacts) -> bool:
    return any(
        quantized_operator(node) is not None
        or _reads_bytes(node, facts)
        or any(_has_bytes(b, TensorFacts(b, facts.storage, facts)) for b in bodies(node))
        for node in graph.node
    )


def _reads_bytes(node: onnx.NodeProto, facts: TensorFacts) -> bool:
    return any(facts.type(name) in (INT8, UINT8) for name in node.input)


def _of_graph(
    graph: onnx.GraphProto, facts: TensorFacts, seen: bool = True
) -> Iterator[IntegerProduct]:
    """``seen`` False: the operands cannot be outputs of the model."""
    for node in graph.node:
        found = _of_node(node, facts)
        yield from found if seen else (replace(linear, left="") for linear in found)
        for body in bodies(node):
            yield from _of_graph(body, TensorFacts(body, facts.storage, facts), seen=False)


def _of_node(node: onnx.NodeProto, facts: TensorFacts) -> Iterator[IntegerProduct]:
    if is_unspecified(node, facts):
        yield IntegerProduct(label(node), "", "", None, reason=unspecified(node))
    elif is_op(node, *_FLOAT_CONVOLUTIONS, *_FLOAT_MATMULS):
        yield from (p for p in _fusible(node, facts) if bound(p).can)
    for a, b in byte_products(node):
        (left, _, _), (right, _, _) = a.names(node), b.names(node)
        left = "" if a.is_float else left
        if facts.type(left) == INT8 or facts.type(right) == UINT8:
            continue  # int8 by int8 and uint8 by uint8 are added in int32
        if is_op(node, *_CONVOLUTIONS):
            yield from _kernel(node, right, facts)
        else:
            yield from _linear(node, left, right, facts)


def label(node: onnx.NodeProto) -> str:
    """The name of a node, that of its first result where it has none."""
    return str(node.name or next(filter(None, node.output), ""))


def is_unspecified(node: onnx.NodeProto, facts: TensorFacts) -> bool:
    """True for an operator of another library that reads int8, or constants of 8 bits.

    ONNX's own operators, those of the table ``QUANTIZED`` but for some, and the model's functions,
    which are examined themselves, are known. uint8 data alone may be an encoded image.
    """
    if is_op(node, *_UNSPECIFIED):
        return True
    name = op_name(node)
    if is_onnx_domain(node) or name in QUANTIZED or name in facts.functions:
        return False
    types = ((facts.type(name), facts.values(name) is not None) for name in node.input)
    return any(kind == INT8 or (kind == UINT8 and constant) for kind, constant in types)


def unspecified(node: onnx.NodeProto) -> str:
    """The reason why an operator has no bound."""
    return f"how {op_name(node)} adds products of integers is not known"


def _fusible(node: onnx.NodeProto, facts: TensorFacts) -> Iterator[IntegerProduct]:
    """A float operator between DequantizeLinear nodes, bounded as the kernel that it may become.

    int8 data counts as uint8, into which ONNX Runtime turns it on x86 (QDQS8ToU8Transformer).
    """
    data, weight = (facts.source(name) for name in node.input[:2])
    if data is None or weight is None or not is_op(data, "DequantizeLinear"):
        return
    if not is_op(weight, "DequantizeLinear") or facts.type(weight.input[0]) != INT8:
        return
    if facts.type(data.input[0]) not in (INT8, UINT8):
        return
    if is_op(node, *_FLOAT_CONVOLUTIONS) and not _requantized(node, facts):
        return  # an integer convolution writes integers
    name = weight.input[0]
    values = facts.values(name)
    if values is None or not values.size:
        found: Iterable[IntegerProduct] = [IntegerProduct(label(node), "", name, None)]
    elif facts.maker(node.input[1]) is not weight or is_op(node, _FUSED_MATMUL):
        # Moved in between, or by the operator itself: any two may become neighbours.
        largest = int(np.abs(values.astype(np.int16)).max())
        found = [IntegerProduct(label(node), "", name, None, largest)]
    elif is_op(node, *_FLOAT_CONVOLUTIONS):
        found = _kernel(node, name, facts)
    else:
        found = _linear(node, "", name, facts)
    yield from (replace(product, reason=_FUSIBLE) for product in found)


def _requantized(node: onnx.NodeProto, facts: TensorFacts) -> bool:
    """True where the result is quantized, directly or after a bound that a quantizer sets too."""
    after = facts.readers(node.output[0])
    return any(
        is_op(reader, "QuantizeLinear")
        or (is_op(reader, "Clip", "Relu") and _requantized(reader, facts))
        for reader in after
    )


def _kernel(node: onnx.NodeProto, weight: str, facts: TensorFacts) -> Iterator[IntegerProduct]:
    """A convolution with int8 filters; a depthwise one adds in int32 everywhere."""
    kernel = facts.values(weight)
    if kernel is None:
        if facts.type(weight) != UINT8:
            yield IntegerProduct(label(node), "", weight, None)
        return
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    if kernel.dtype == np.int8 and kernel.shape[:2] != (groups, 1):
        yield IntegerProduct(label(node), "", weight, summed_first(kernel))


def _linear(
    node: onnx.NodeProto, left: str, right: str, facts: TensorFacts
) -> Iterator[IntegerProduct]:
    values = facts.values(right)
    if values is None:
        yield IntegerProduct(label(node), left, right, None, _largest(right, facts))
        return
    if values.dtype != np.int8 or not values.ndim:
        return
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    if values.ndim == 2:
        yield IntegerProduct(label(node), left, right, values.T if transposed else values)
        return
    # A stack of matrices, or a vector: bounded, but rows are not counted, which differ by matrix.
    tall = values[:, None] if values.ndim == 1 else np.moveaxis(values, -2, 0)
    yield IntegerProduct(label(node), "", right, tall.reshape(len(tall), -1))


def _largest(name: str, facts: TensorFacts) -> int:
    """The magnitude to which int8 data is clipped, 128 where it is not."""
    node = facts.source(name)
    if node is None or node.op_type != "Clip":
        return 128
    ends = [v for n in node.input[1:] if (v := facts.values(n)) is not None]
    return max(abs(int(e)) for e in ends) if len(ends) == 2 else 128


def bound(linear: IntegerProduct) -> Saturation:
    """The pairs that can saturate, for any input."""
    if linear.weight is None:
        can, total = int(2 * _LARGEST * linear.largest > HIGH), 1
        reason = linear.reason or _COMPUTED
    else:
        found = can_leave(*pairs(linear.weight))
        can, total, reason = int(found.sum()), found.size, linear.reason
    return Saturation(linear.node, can, total, reason=reason if can else "")


def can_leave(first: Array, second: Array) -> Array:
    """Elementwise, where ``a · first + b · second`` exceeds int16 for some uint8 a, b; int8."""
    exceeds: Array = worst_sums(first.astype(np.int16), second.astype(np.int16)) > PAIR_SUM
    return exceeds


def _leaves(sums: Array) -> Array:
    return (sums > HIGH) | (sums < LOW)


def observe(linear: IntegerProduct, left: Array, right: Array | None = None) -> Saturation:
    """Saturation with these operands: uint8 [..., rows, inputs], int8 [..., inputs, outputs]."""
    found = bound(linear)
    if left.dtype != np.uint8 or (right is not None and right.dtype != np.int8):
        return Saturation(found.node, 0, found.pairs)
    if linear.weight is None and right is not None:
        counted = [_count(a, b) for a, b in _batches(left, right)]
        did, sums = (sum(column[i] for column in counted) for i in (0, 1))
    else:
        assert linear.weight is not None
        did, sums = _count(left.reshape(-1, left.shape[-1]), linear.weight)
    return replace(found, did=did, sums=sums)


def _batches(left: Array, right: Array) -> Iterator[tuple[Array, Array]]:
    """The first pairs of matrices of two stacks, broadcast as in MatMul."""
    left = left[None] if left.ndim == 1 else left
    right = right[:, None] if right.ndim == 1 else right
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    lefts = np.broadcast_to(left, (*lead, *left.shape[-2:])).reshape(-1, *left.shape[-2:])
    rights = np.broadcast_to(right, (*lead, *right.shape[-2:])).reshape(-1, *right.shape[-2:])
    return zip(lefts[:_BATCHES], rights[:_BATCHES], strict=True)


def _count(left: Array, weight: Array) -> tuple[int, int]:
    """(sums that exceed int16, all sums) for uint8 [rows, inputs] by int8 [inputs, outputs]."""
    rows = left[:: max(1, len(left) // _ROWS)].astype(np.int32)
    places, columns = np.nonzero(can_leave(*pairs(weight)))
    first, second = pairs(weight.astype(np.int32))
    did = 0  # only pairs that can exceed int16 are computed
    for start in range(0, len(places), _CHUNK):
        at, to = places[start : start + _CHUNK], columns[start : start + _CHUNK]
        sums = rows[:, 2 * at] * first[at, to] + rows[:, 2 * at + 1] * second[at, to]
        did += int(_leaves(sums).sum())
    return did, len(rows) * first.size


def saturated_product(left: Array, weight: Array) -> Array:
    """The result on x86 without VNNI, int32: uint8 [rows, inputs] by int8 [inputs, outputs]."""
    first, second = pairs(weight.astype(np.int32))
    a = left.astype(np.int32)
    even = a[:, : 2 * len(first)]
    # Sums of pairs, [rows, pairs, outputs], which saturate to int16.
    sums = even[:, 0::2, None] * first + even[:, 1::2, None] * second
    total: Array = np.clip(sums, LOW, HIGH).sum(1, dtype=np.int32)
    if len(weight) % 2:
        total = total + a[:, -1:] * weight[-1].astype(np.int32)
    return total
