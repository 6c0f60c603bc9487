"""Whether a compiled model answers alike with and without VNNI: its sums of products, emulated.

x86 without VNNI adds neighbouring products a[2i] w[2i] + a[2i+1] w[2i+1] of u8 by s8 in int16,
which saturates (vpmaddubsw); everything else adds in int32. So for each integer linear: how many
pairs of its weights can leave int16 whatever comes in (255 is the largest activation), and how many
sums did on real inputs. Source: MLAS, QgemmU8S8KernelAvx2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from qcompile.qtypes import Array
from qcompile.tensors import Storage, values_of

LOW, HIGH = -(1 << 15), (1 << 15) - 1
_LARGEST = 255
_ROWS = 256  # looked at of each linear, evenly spread
_BATCHES = 16
_CHUNK = 1 << 14  # pairs at a time: int32 sums of all rows are 16 MB
# Operators by the slots of their data and their weight.
_SLOTS = {"MatMulIntegerToFloat": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
_FLOATING = ("MatMul", "Gemm")  # between quantizers, which the runtime may fuse
_CONVOLUTION = "QLinearConv"  # its weight is in slot 3; the order of its sums is the runtime's


@dataclass(frozen=True)
class Linear:
    """An integer product. ``weight``: int8 [inputs, outputs], None where ``right`` is data too.

    ``left`` and ``right`` name the tensors that hold the operands, ``left`` "" where it is not to
    be had.
    """

    node: str
    left: str
    right: str
    weight: Array | None
    any_pair: bool = False


@dataclass(frozen=True)
class Saturation:
    """Of one linear: weight pairs that can saturate, of how many; sums that did, of how many."""

    node: str
    can: int
    pairs: int
    did: int | None = None
    sums: int = 0


def exact_on_all(found: list[Saturation]) -> bool:
    """True where no sum can saturate: the model then answers alike on all machines."""
    return not any(s.can for s in found)


def linears(model: onnx.ModelProto, storage: Storage | None = None) -> Iterator[Linear]:
    """The integer products of a compiled model, in order; ``storage`` as ``loading.read`` has it.

    Weights in files are views.
    """
    storage = storage or Storage()
    constants = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == _CONVOLUTION and node.input[3] in constants:
            kernel = values_of(constants[node.input[3]], storage)
            if kernel.dtype == np.int8:
                yield Linear(node.name, "", "", kernel.reshape(len(kernel), -1).T, any_pair=True)
        elif node.op_type in _SLOTS:
            left, right = (node.input[i] for i in _SLOTS[node.op_type])
            yield from _linear(node, left, right, constants, storage)
        elif node.op_type in _FLOATING:
            sources = [makers.get(name) for name in node.input[:2]]
            pair = [s for s in sources if s is not None and s.op_type == "DequantizeLinear"]
            if len(pair) == 2 and not _is_signed(pair[0], constants):
                left, right = (s.input[0] for s in pair)
                transposed = any(a.name == "transB" and a.i for a in node.attribute)
                yield from _linear(node, left, right, constants, storage, transposed)


def _is_signed(dequantizer: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """True where the zero point says int8: s8 by s8 is never added in int16."""
    zero = constants.get(dequantizer.input[2]) if len(dequantizer.input) > 2 else None
    return zero is not None and zero.data_type == onnx.TensorProto.INT8


def _linear(
    node: onnx.NodeProto,
    left: str,
    right: str,
    constants: Mapping[str, onnx.TensorProto],
    storage: Storage,
    transposed: bool = False,
) -> Iterator[Linear]:
    if right not in constants:
        yield Linear(node.name, left, right, None)
        return
    values = values_of(constants[right], storage)
    if values.dtype != np.int8 or not values.ndim:
        return
    if values.ndim == 2:
        yield Linear(node.name, left, right, values.T if transposed else values)
        return
    # A stack of matrices, or a vector: bounded, but no run says which rows meet which of them.
    tall = values[:, None] if values.ndim == 1 else np.moveaxis(values, -2, 0)
    yield Linear(node.name, "", right, tall.reshape(len(tall), -1))


def bound(linear: Linear) -> Saturation:
    """What can happen, whatever comes in."""
    if linear.weight is None:
        return Saturation(linear.node, 1, 1)
    if linear.any_pair:
        ends = np.sort(linear.weight, axis=0)[[-2, -1, 0, 1] if len(linear.weight) > 1 else [0]]
        sums = _worst(*np.split(ends, 2)) if len(ends) > 1 else ends
        return Saturation(linear.node, int(_leaves(sums).any(0).sum()), linear.weight.shape[1])
    first, second = _pairs(linear.weight)
    return Saturation(linear.node, int(_leaves(_worst(first, second)).sum()), first.size)


def _pairs(weight: Array) -> tuple[Array, Array]:
    """Rows 2i and 2i + 1, int32; a last row without a partner is alone, and fits."""
    even = weight[: len(weight) // 2 * 2].astype(np.int32)
    return even[0::2], even[1::2]


def _worst(first: Array, second: Array) -> Array:
    """The sum furthest from 0: each activation is 0 where its product would pull back."""
    first, second = first.astype(np.int32), second.astype(np.int32)
    up = np.maximum(first, 0) + np.maximum(second, 0)
    down = np.minimum(first, 0) + np.minimum(second, 0)
    return np.where(up > -down, up, down) * _LARGEST


def _leaves(sums: Array) -> Array:
    return (sums > HIGH) | (sums < LOW)


def observe(linear: Linear, left: Array, right: Array | None = None) -> Saturation:
    """What happened with these operands: uint8 [..., rows, inputs], int8 [..., inputs, outputs]."""
    found = bound(linear)
    if left.dtype != np.uint8 or (right is not None and right.dtype != np.int8):
        return Saturation(found.node, 0, found.pairs)
    if linear.weight is None and right is not None:
        counted = [_count(a, b) for a, b in _batches(left, right)]
        did, sums = (sum(column[i] for column in counted) for i in (0, 1))
    else:
        assert linear.weight is not None
        did, sums = _count(left.reshape(-1, left.shape[-1]), linear.weight)
    return Saturation(found.node, found.can, found.pairs, did, sums)


def _batches(left: Array, right: Array) -> Iterator[tuple[Array, Array]]:
    """The first matrices of two stacks that broadcast, as MatMul pairs them."""
    left = left[None] if left.ndim == 1 else left
    right = right[:, None] if right.ndim == 1 else right
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    lefts = np.broadcast_to(left, (*lead, *left.shape[-2:])).reshape(-1, *left.shape[-2:])
    rights = np.broadcast_to(right, (*lead, *right.shape[-2:])).reshape(-1, *right.shape[-2:])
    return zip(lefts[:_BATCHES], rights[:_BATCHES], strict=True)


def _count(left: Array, weight: Array) -> tuple[int, int]:
    """(sums that leave int16, sums looked at) for uint8 [rows, inputs]; only pairs that can."""
    rows = left[:: max(1, len(left) // _ROWS)].astype(np.int32)
    first, second = _pairs(weight)
    places, columns = np.nonzero(_leaves(_worst(first, second)))
    did = 0
    for start in range(0, len(places), _CHUNK):
        at, to = places[start : start + _CHUNK], columns[start : start + _CHUNK]
        sums = rows[:, 2 * at] * first[at, to] + rows[:, 2 * at + 1] * second[at, to]
        did += int(_leaves(sums).sum())
    return did, len(rows) * first.size


def saturated_product(left: Array, weight: Array) -> Array:
    """The product as x86 without VNNI computes it: uint8 [rows, inputs] by int8, in int32."""
    first, second = _pairs(weight)
    a = left.astype(np.int32)
    even = a[:, : 2 * len(first)]
    sums = even[:, 0::2, None] * first + even[:, 1::2, None] * second
    total: Array = np.clip(sums, LOW, HIGH).sum(1, dtype=np.int32)
    if len(weight) % 2:
        total = total + a[:, -1:] * weight[-1].astype(np.int32)
    return total
