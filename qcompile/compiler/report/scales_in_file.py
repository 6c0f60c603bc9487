"""Reads scales and zero points from the graph of any quantized model.

A quantizer belongs to the tensor that it quantizes: the input of a QuantizeLinear, or a constant
that an operator reads together with its scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import onnx

from qcompile.ir import is_op
from qcompile.ir.model_io.computed_at_load import sources
from qcompile.ir.model_io.external_data import Storage, values_of
from qcompile.ir.quantized_operators import quantized_operator
from qcompile.quant import Array


@dataclass(frozen=True)
class Scales:
    """A summary of many scales."""

    scales: int
    lowest: float
    highest: float
    sha256: Annotated[str, "of scales and zero points, its first digits"]


@dataclass(frozen=True)
class Quantizer:
    """One tensor's scale, of shape (), (channels,) or blocked; zero point None is 0."""

    tensor: str
    scale: Array
    zero_point: Array | None

    def steps(self) -> float | Scales:
        """A single scale as a number, many as a summary."""
        if self.scale.size == 1:
            return float(self.scale.item())
        span = float(self.scale.min()), float(self.scale.max())
        return Scales(self.scale.size, *span, self.digest())

    def single_zero_point(self) -> int | None:
        """The zero point of a single scale, None if there are many."""
        if self.scale.size != 1:
            return None
        return 0 if self.zero_point is None else int(self.zero_point.item())

    def to_dict(self) -> dict[str, Any]:
        """Values for YAML: scale and zero point, or the summary of many scales."""
        steps = self.steps()
        if isinstance(steps, Scales):
            return asdict(steps)
        return {"scale": steps, "zero_point": self.single_zero_point()}

    def digest(self) -> str:
        """Short hash of scales and zero points."""
        parts = (self.scale, self.zero_point)
        raw = b"".join(np.ascontiguousarray(a).tobytes() for a in parts if a is not None)
        return hashlib.sha256(raw).hexdigest()[:12]


def read_quantizers(model: onnx.ModelProto, storage: Storage | None = None) -> dict[str, Quantizer]:
    """The first quantizer of each tensor, by its name; scales that are computed are left out.

    ``storage``: of values outside the model file. Raises ModelError if a scale cannot be read.
    """
    where = storage or Storage()
    constants = {t.name: t for t in model.graph.initializer}
    quantizers: dict[str, Quantizer] = {}
    packed = {name: found[0] for name, found in sources(model.graph).items()}
    for node in model.graph.node:
        for computed, scale, zero in _operands(node, constants, packed):
            operand = packed.get(computed, computed)
            if operand not in quantizers:
                zero_point = None if zero is None else values_of(zero, where)
                quantizers[operand] = Quantizer(operand, values_of(scale, where), zero_point)
    return quantizers


def _operands(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], packed: dict[str, str]
) -> Iterator[tuple[str, onnx.TensorProto, onnx.TensorProto | None]]:
    row = quantized_operator(node)
    for operand in () if row is None else row.operands_of(node):
        name, scale, zero = operand.names(node)
        if scale in constants and (name in packed or is_op(node, "QuantizeLinear")):
            yield name, constants[scale], constants.get(zero)
