"""Reads from the graph of any model which of its constants are packed weights, and their bits.

A weight of 5 bits is one UINT4 tensor of planes, from which operators compute int8 values when the
model is loaded (``passes/lower/storage/store_few_bits.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from qcompile.ir import is_op
from qcompile.ir.model_io.computed_at_load import sources

_NIBBLES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
_INTEGERS = (*_NIBBLES, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


@dataclass(frozen=True)
class PackedWeight:
    """Bits of one value, and the shape of the unpacked weight."""

    bits: int
    shape: tuple[int, ...]


# Operators that take planes apart and join them, up to the Reshape to the weight.
_PLANES = ("BitShift", "BitwiseAnd", "BitwiseOr", "Cast", "Concat", "Slice", "Sub")


def packed_weights(graph: onnx.GraphProto) -> dict[str, PackedWeight]:
    """Weights of planes, by the names of the constants that hold them."""
    constants = {t.name: t for t in graph.initializer}
    readers = {name: node for node in reversed(graph.node) for name in node.input}
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.UINT4:
            continue
        shape = _unpacked_shape(tensor.name, readers, constants)
        count = math.prod(shape) if shape else 0
        if count:
            found[tensor.name] = PackedWeight(4 * math.prod(tensor.dims) // count, shape)
    return found


def _unpacked_shape(
    name: str, readers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> tuple[int, ...]:
    """The shape that planes get once they are joined, () where there is no such Reshape."""
    node = readers.get(name)
    while node is not None and is_op(node, *_PLANES):
        node = readers.get(node.output[0])
    if node is None or not is_op(node, "Reshape") or node.input[1] not in constants:
        return ()
    shape = onnx.numpy_helper.to_array(constants[node.input[1]])
    return tuple(int(size) for size in shape)


def multipliers(graph: onnx.GraphProto) -> set[str]:
    """Integer constants by which codes of a weight are multiplied when the model is loaded."""
    integers = {t.name for t in graph.initializer if t.data_type in _INTEGERS}
    found = sources(graph)
    products = (n for n in graph.node if is_op(n, "Mul") and n.output[0] in found)
    return {name for node in products for name in found[node.input[1]]} & integers
