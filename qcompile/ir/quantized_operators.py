"""Table of quantized operators: which inputs are data, weights, scales and zero points.

Operators of ONNX and of ONNX Runtime (com.microsoft). Input slots are those of the operators'
schemas; a test checks the table against them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx

from qcompile.ir.operators import MICROSOFT, op_name
from qcompile.ir.tensor import Node

# "matmul", "gemm", "attention", "recurrent", "convolution": multiply 8-bit integers. "wide": a
# MatMul of 16-bit integers. "blocks": a MatMul of floats by integers with a scale per block.
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
    """Input slots of an operand's values, scale and zero point; None where there is none.

    ``is_float``: the values are float, and the operator quantizes them itself or not at all.
    """

    value: int | None
    scale: int | None = None
    zero_point: int | None = None
    is_float: bool = False

    def names(self, node: onnx.NodeProto) -> tuple[str, str, str]:
        """A node's tensors for values, scale and zero point, "" where one is missing."""
        value, scale, zero = (
            input_name(node, slot) for slot in (self.value, self.scale, self.zero_point)
        )
        return value, scale, zero


@dataclass(frozen=True)
class QuantizedOperator:
    """The operands of an operator in the order of its inputs, data before weights.

    result: scale and zero point of the output. bias: slot of an int32 bias, whose scale is the
    product of both operands' scales. repeats: the last operand (three slots) is variadic.
    """

    kind: Kind
    operands: tuple[Operand, ...]
    result: Operand = Operand(None)
    bias: int | None = None
    repeats: bool = False

    @property
    def weights(self) -> tuple[Operand, ...]:
        """The operands that are multiplied with the first one, constant in most models."""
        return self.operands[1:]

    def operands_of(self, node: onnx.NodeProto) -> Iterator[Operand]:
        """The operands of one node, with a variadic one expanded."""
        yield from self.operands
        if self.repeats:
            first = self.operands[-1].value or 0
            for slot in range(first + 3, len(node.input), 3):
                yield Operand(slot, slot + 1, slot + 2)

    def parameters(self, node: onnx.NodeProto) -> set[str]:
        """A node's tensors for scales, zero points and int32 bias."""
        pairs = (o.names(node)[1:] for o in (*self.operands_of(node), self.result))
        return {input_name(node, self.bias), *(name for pair in pairs for name in pair)} - {""}


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
    """Left and right operands of each 8-bit matrix multiplication that an operator computes.

    Sides are those of ONNX Runtime's kernels: x86 without VNNI adds products of uint8 on the left
    by int8 on the right in int16, all others in int32.
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
QUANTIZED_CONVOLUTIONS = _of_kinds("convolution")
# Multiplications by weights, which take most of a model's time.
QUANTIZED_LINEARS = _of_kinds(
    "matmul", "wide", "blocks", "gemm", "attention", "recurrent", "convolution"
)
