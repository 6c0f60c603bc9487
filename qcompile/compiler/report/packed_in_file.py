"""Reads from the graph of any model which of its constants are packed weights, and their bits.

A weight of 5 bits is one UINT4 tensor of planes, from which operators compute int8 values when the
model is loaded (``passes/lower/storage/store_few_bits.py``). The bytes of blocks that MatMulNBits
and GatherBlockQuantized read hold values of 2, 4 or 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from qcompile.ir import MICROSOFT, is_op
from qcompile.ir.model_io.computed_at_load import sources
from qcompile.ir.operators import op_name
from qcompile.ir.quantized_operators import input_name

_NIBBLES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
_INTEGERS = (*_NIBBLES, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


_LAYER, _TABLE = f"{MICROSOFT}.MatMulNBits", f"{MICROSOFT}.GatherBlockQuantized"
_ZERO_POINT = 3  # its slot in both


@dataclass(frozen=True)
class PackedWeight:
    """Type of the values, as in ``int5``, and shape of the unpacked weight."""

    dtype: str
    shape: tuple[int, ...]


# Operators that take planes apart and join them, up to the Reshape to the weight.
_PLANES = ("BitShift", "BitwiseAnd", "BitwiseOr", "Cast", "Concat", "Slice", "Sub")


def packed_weights(graph: onnx.GraphProto) -> dict[str, PackedWeight]:
    """Weights of planes or blocks, by the names of the constants that hold them."""
    return {**_planes(graph), **_blocks(graph)}


def _planes(graph: onnx.GraphProto) -> dict[str, PackedWeight]:
    constants = {t.name: t for t in graph.initializer}
    readers = {name: node for node in reversed(graph.node) for name in node.input}
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.UINT4:
            continue
        shape = _unpacked_shape(tensor.name, readers, constants)
        count = math.prod(shape) if shape else 0
        if count:
            bits = 4 * math.prod(tensor.dims) // count
            found[tensor.name] = PackedWeight(f"int{bits}", shape)
    return found


def _blocks(graph: onnx.GraphProto) -> dict[str, PackedWeight]:
    """Weights whose bytes MatMulNBits and GatherBlockQuantized read, also behind a Reshape.

    A table is also the weight of a layer where both read it: then it has the shape of the layer's.
    """
    bytes_ = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8}
    computed = sources(graph)
    found: dict[str, PackedWeight] = {}
    for node in graph.node:
        slot = {_LAYER: 1, _TABLE: 0}.get(op_name(node))
        if slot is None:
            continue
        name = computed.get(node.input[slot], (node.input[slot],))[0]
        if name in bytes_ and (name not in found or slot):
            weight = _unpacked(node, tuple(bytes_[name].dims))
            found |= {} if weight is None else {name: weight}
    return found


def _unpacked(node: onnx.NodeProto, dims: tuple[int, ...]) -> PackedWeight | None:
    """The weight of MatMulNBits as (inputs, outputs), or the table of GatherBlockQuantized.

    None where attributes are missing or make no sense: such a model does not run.
    """
    given = {a.name: a.i for a in node.attribute}
    bits = given.get("bits", 4)
    if bits not in (2, 4, 8) or len(dims) < 2 or ("K" in given) != ("N" in given):
        return None
    shape = (given["K"], given["N"]) if "K" in given else (*dims[:-1], dims[-1] * 8 // bits)
    sign = "u" if input_name(node, _ZERO_POINT) else ""  # without one, zero is in the middle
    return PackedWeight(f"{sign}int{bits}", shape)


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
