"""Which inputs of quantized operators hold data, weights, scales and zero points: one table.

Of ONNX and of ONNX Runtime (com.microsoft). Slots are those of the operators' schemas, to which a
test holds this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx

from qcompile.ir.operators import MICROSOFT, op_name
from qcompile.ir.tensor import Node

# "matmul", "gemm", "attention", "recurrent", "convolution": products of 8-bit integers. "wide":
# a MatMul of 16-bit integers, "blocks": a MatMul of floats by integers with scales for each block.
Kind = Literal[
    "matmul",
    "wide",
    "blocks",
    "gemm",
    "attention",
    "recurrent",
    "convolution",
    "quantizer",
    "other",
]


@dataclass(frozen=True)
class Operand:
    """Input slots of an operand: its values, their scale and zero point; None for what it lacks.

    ``is_float``: the values come in float, and the operator quantizes them itself or not at all.
    """

    value: int | None
    scale: int | None = None
    zero_point: int | None = None
    is_float: bool = False

    def names(self, node: onnx.NodeProto) -> tuple[str, str, str]:
        """Tensors that a node has as values, scale and zero point, "" where one is missing."""
        value, scale, zero = (
            input_name(node, slot) for slot in (self.value, self.scale, self.zero_point)
        )
        return value, scale, zero


@dataclass(frozen=True)
class QuantizedOperator:
    """The operands of an operator in the order of its inputs, so that data comes before weights.

    result: scale and zero point of what it makes. bias: an int32 one, in steps of the product of
    the scales of both operands. repeats: the last operand, three slots, comes any number of times.
    """

    kind: Kind
    operands: tuple[Operand, ...]
    result: Operand = Operand(None)
    bias: int | None = None
    repeats: bool = False

    @property
    def weights(self) -> tuple[Operand, ...]:
        """Of a product: what is multiplied with the first operand, constant in most models."""
        return self.operands[1:]

    def operands_of(self, node: onnx.NodeProto) -> Iterator[Operand]:
        """The operands of one node, each repeated one by itself."""
        yield from self.operands
        if self.repeats:
            first = self.operands[-1].value or 0
            for slot in range(first + 3, len(node.input), 3):
                yield Operand(slot, slot + 1, slot + 2)

    def parameters(self, node: onnx.NodeProto) -> set[str]:
        """Tensors that a node has as scales, zero points and biases in their steps."""
        found = (o.names(node)[1:] for o in (*self.operands_of(node), self.result))
        return {input_name(node, self.bias), *(name for pair in found for name in pair)} - {""}


_ONE = (Operand(0, 1, 2),)
_TWO = (Operand(0, 1, 2), Operand(3, 4, 5))
_FLOAT = Operand(0, is_float=True)
_UNARY = QuantizedOperator("other", _ONE, Operand(None, 3, 4))
_BINARY = QuantizedOperator("other", _TWO, Operand(None, 6, 7))
_CONVOLUTION = QuantizedOperator("convolution", _TWO, Operand(None, 6, 7), bias=8)
_QUANTIZE = QuantizedOperator("quantizer", (Operand(0, 1, 2, is_float=True),), Operand(None, 1, 2))
_DEQUANTIZE = QuantizedOperator("quantizer", _ONE)
_INTEGER_FACTORS = (Operand(0, None, 2), Operand(1, None, 3))
_CONV_INTEGER = QuantizedOperator("convolution", _INTEGER_FACTORS)

_STANDARD: dict[str, QuantizedOperator] = {
    "ConvInteger": _CONV_INTEGER,
    "DequantizeLinear": _DEQUANTIZE,
    "DynamicQuantizeLinear": QuantizedOperator("quantizer", (_FLOAT,)),
    "MatMulInteger": QuantizedOperator("matmul", _INTEGER_FACTORS),
    "QLinearConv": _CONVOLUTION,
    "QLinearMatMul": QuantizedOperator("matmul", _TWO, Operand(None, 6, 7)),
    "QuantizeLinear": _QUANTIZE,
}
_MICROSOFT: dict[str, QuantizedOperator] = {
    "DequantizeLinear": _DEQUANTIZE,
    "DynamicQuantizeLSTM": QuantizedOperator(
        "recurrent", (_FLOAT, Operand(1, 8, 9), Operand(2, 10, 11))
    ),
    "DynamicQuantizeMatMul": QuantizedOperator("matmul", (_FLOAT, Operand(1, 2, 3))),
    "GatherBlockQuantized": QuantizedOperator("other", (Operand(0, 2, 3),)),
    "MatMulBnb4": QuantizedOperator("blocks", (_FLOAT, Operand(1, 2))),
    "MatMulInteger16": QuantizedOperator("wide", (Operand(0), Operand(1))),
    "MatMulIntegerToFloat": QuantizedOperator("matmul", (Operand(0, 2, 4), Operand(1, 3, 5))),
    "MatMulNBits": QuantizedOperator("blocks", (_FLOAT, Operand(1, 2, 3))),
    "QAttention": QuantizedOperator("attention", (Operand(0, 3, 6), Operand(1, 4, 7))),
    "QEmbedLayerNormalization": QuantizedOperator(
        "other", tuple(Operand(slot, slot + 6, slot + 11) for slot in range(2, 7))
    ),
    "QGemm": QuantizedOperator("gemm", _TWO, Operand(None, 7, 8), bias=6),
    "QLinearAdd": _BINARY,
    "QLinearAveragePool": _UNARY,
    "QLinearConcat": QuantizedOperator(
        "other", (Operand(2, 3, 4),), Operand(None, 0, 1), repeats=True
    ),
    "QLinearConv": _CONVOLUTION,
    "QLinearGlobalAveragePool": _UNARY,
    "QLinearLeakyRelu": _UNARY,
    "QLinearMul": _BINARY,
    "QLinearReduceMean": _UNARY,
    "QLinearSigmoid": _UNARY,
    "QLinearSoftmax": _UNARY,
    "QLinearWhere": QuantizedOperator(
        "other", (Operand(1, 2, 3), Operand(4, 5, 6)), Operand(None, 7, 8)
    ),
    "QMoE": QuantizedOperator(
        "other", (_FLOAT, *(Operand(2 + 3 * i, 3 + 3 * i, 11 + i) for i in range(3)))
    ),
    "QuantizeLinear": _QUANTIZE,
}
QUANTIZED = {**_STANDARD, **{f"{MICROSOFT}.{op}": row for op, row in _MICROSOFT.items()}}


def input_name(node: onnx.NodeProto, slot: int | None) -> str:
    """The tensor in an input slot, "" where it is missing."""
    return "" if slot is None or slot >= len(node.input) else str(node.input[slot])


def quantized_operator(node: Node | onnx.NodeProto) -> QuantizedOperator | None:
    """The table's row of a node, None for operators that are not quantized."""
    return QUANTIZED.get(op_name(node))


def byte_products(node: onnx.NodeProto) -> Iterator[tuple[Operand, Operand]]:
    """The products of 8-bit integers that an operator computes: its left and right operands, as
    ONNX Runtime's kernels have them.

    x86 without VNNI adds uint8 on the left by int8 on the right in int16, all others in int32.
    """
    row = quantized_operator(node)
    if row is None or row.kind in ("wide", "blocks", "quantizer", "other"):
        return
    for weight in row.weights:  # ConvInteger has its filters on the left
        yield (weight, row.operands[0]) if row is _CONV_INTEGER else (row.operands[0], weight)


def _of_kinds(*kinds: Kind) -> tuple[str, ...]:
    return tuple(op for op, row in QUANTIZED.items() if row.kind in kinds)


QDQ = ("QuantizeLinear", "DequantizeLinear")
QUANTIZERS = (*QDQ, "DynamicQuantizeLinear")
QUANTIZED_MATMULS = _of_kinds("matmul", "wide", "blocks")
# Of data by a matrix, or by filters: what a model spends its time in.
QUANTIZED_LINEARS = _of_kinds("matmul", "wide", "blocks", "gemm", "attention", "convolution")
