"""Scales and zero points as they stand in a graph, whoever made it.

A quantizer belongs to the tensor that becomes an integer: the input of a QuantizeLinear, or a
constant that some operator reads together with its scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from qcompile.ir.model_io.external_data import Storage, values_of
from qcompile.quant import Array

# Operator -> (operand, scale, zero point) slots of each operand that is quantized.
SLOTS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "DequantizeLinear": ((0, 1, 2),),
    "DynamicQuantizeMatMul": ((1, 2, 3),),
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
    "MatMulNBits": ((1, 2, 3),),
    "QGemm": ((0, 1, 2), (3, 4, 5)),
    "QLinearConv": ((0, 1, 2), (3, 4, 5)),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5)),
    "QuantizeLinear": ((0, 1, 2),),
}


@dataclass(frozen=True)
class Quantizer:
    """One tensor's scale, () or (channels,) or as the operator has it; zero point None is 0."""

    tensor: str
    scale: Array
    zero_point: Array | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: a single scale as it is, many as their count, extrema and digest."""
        if self.scale.size == 1:
            zero = 0 if self.zero_point is None else self.zero_point.item()
            return {"scale": self.scale.item(), "zero_point": zero}
        return {
            "scales": self.scale.size,
            "lowest": float(self.scale.min()),
            "highest": float(self.scale.max()),
            "sha256": self.digest(),
        }

    def digest(self) -> str:
        """Short hash of scales and zero points."""
        parts = (self.scale, self.zero_point)
        raw = b"".join(np.ascontiguousarray(a).tobytes() for a in parts if a is not None)
        return hashlib.sha256(raw).hexdigest()[:12]


def quantizers(model: onnx.ModelProto, storage: Storage | None = None) -> dict[str, Quantizer]:
    """By tensor, the first quantizer of each; scales that are computed are left out.

    ``storage`` is where values lie that the model does not hold. Raises ModelError where a scale
    cannot be read.
    """
    where = storage or Storage()
    constants = {t.name: t for t in model.graph.initializer}
    found: dict[str, Quantizer] = {}
    for node in model.graph.node:
        for operand, scale, zero in _operands(node, constants):
            if operand not in found:
                values = None if zero is None else values_of(zero, where)
                found[operand] = Quantizer(operand, values_of(scale, where), values)
    return found


def _operands(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]
) -> Iterator[tuple[str, onnx.TensorProto, onnx.TensorProto | None]]:
    for operand, scale, zero in SLOTS.get(node.op_type, ()):
        if len(node.input) <= scale or node.input[scale] not in constants:
            continue
        name = node.input[operand]
        if name in constants or node.op_type == "QuantizeLinear":
            point = node.input[zero] if len(node.input) > zero else ""
            yield name, constants[node.input[scale]], constants.get(point)
