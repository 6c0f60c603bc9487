"""Requirements on Q/DQ nodes, for runtimes that read them as a contract (explicit quantization).

Integer types, zero points, scales and permitted readers differ between runtimes; a target lists the
rules it needs, with their values. Each rule checks one thing, so that its message is specific.

TensorRT's, with float16 between the quantizers: onnx-tensorrt 10.1 and 10.15, onnxOpImporters.cpp,
QuantDequantLinearHelper (scales are positive, as many as zero points, and give both operators their
type; INT4 has an even number of values and equal blocks along one axis, whose size follows from the
shapes); NVIDIA's operator pages "Quantize" and "Dequantize" and "Working with Quantized Types" of
TensorRT 11 (symmetric; constant scales; INT4 is for weights, in blocks along one of the last two
axes) and "Migrating from TensorRT 10.x to 11.x" (all networks are strongly typed: types are those
of the file, and nothing is cast).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from qcompile.ir import (
    HALF_TYPES,
    Graph,
    Node,
    Shape,
    Tensor,
    array,
    domain_of,
    half_type,
    is_constant,
    is_float,
    is_layout,
    is_op,
    is_zero,
    rank,
    shape_of,
)
from qcompile.ir.quantized_operators import QDQ
from qcompile.targets.definitions import definition
from qcompile.targets.requirements import Fault, Findings, Requirement

_BIAS = 2  # input slot of Gemm and Conv
_INT4 = "int4"


def _dequantizer(graph: Graph, tensor: Tensor) -> Node | None:
    """The DequantizeLinear that computes a tensor, before layout operators; else None."""
    node = graph.producer(tensor)
    while node is not None and is_layout(node):
        node = graph.producer(node.inputs[0])
    return node if node is not None and is_op(node, "DequantizeLinear") else None


def _integers(node: Node) -> str | None:
    """The integer type of a quantizer: that of its zero point, or of what it reads."""
    zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    typed = zero if zero is not None else node.inputs[0] if _is_dequantizer(node) else None
    if typed is None or typed.dtype is None:
        return None
    if isinstance(typed.dtype, int):  # an ONNX enum, for a type that numpy lacks
        return str(onnx.helper.tensor_dtype_to_np_dtype(typed.dtype).name)
    return str(np.dtype(typed.dtype).name)


def _float_type(tensor: Tensor) -> str | None:
    """float32, float16 or bfloat16; None for other and unknown types."""
    return "float32" if tensor.name and is_float(tensor) else half_type(tensor)


def _has_int4(node: Node | None) -> bool:
    return node is not None and _integers(node) == _INT4


def _is_dequantizer(node: Node) -> bool:
    return is_op(node, "DequantizeLinear")


@dataclass(frozen=True)
class Integers(Requirement):
    """Quantizers use these integer types, bias and weights included."""

    types: tuple[str, ...]

    rule: ClassVar[str] = "integer-types"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *QDQ):
            dtype = _integers(node)
            if dtype is not None and dtype not in self.types:
                wanted = " or ".join(self.types)
                yield Fault(self.rule, node.name, f"{node.op} of {dtype}, expected {wanted}")


@dataclass(frozen=True)
class ZeroPoints(Requirement):
    """Zero points are constant and 0: the runtime supports only symmetric quantization."""

    rule: ClassVar[str] = "zero-points"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *QDQ):
            for tensor in node.inputs[2:]:
                if not is_zero(tensor):
                    what = _values(tensor) if is_constant(tensor) else "computed"
                    yield Fault(self.rule, node.name, f"zero point is {what}, expected 0")


def _values(tensor: Tensor) -> str:
    values = np.unique(array(tensor))
    return ", ".join(map(str, values[:3])) + (", …" if len(values) > 3 else "")


@dataclass(frozen=True)
class ZeroPointSizes(Requirement):
    """A quantizer has as many zero points as scales, if it has any."""

    rule: ClassVar[str] = "zero-point-sizes"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *QDQ):
            for tensor in node.inputs[2:]:
                scales, zeros = (shape_of(t) for t in (node.inputs[1], tensor))
                if tensor.name and scales != zeros:
                    what = f"zero point of shape {_listed(zeros)}, expected {_listed(scales)}"
                    yield Fault(self.rule, node.name, f"{what}, as the scale")


def _listed(shape: Shape | None) -> str:
    return "unknown" if shape is None else str(list(shape))


@dataclass(frozen=True)
class PositiveScales(Requirement):
    """Constant scales are positive and finite; in float16 a small one would be 0."""

    rule: ClassVar[str] = "positive-scales"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *QDQ):
            scale = node.inputs[1]
            values = array(scale) if is_constant(scale) else np.ones(1)
            if values.size and not ((values > 0) & np.isfinite(values)).all():
                what = f"scale {scale.name!r} holds {values.min():g} to {values.max():g}"
                yield Fault(self.rule, node.name, f"{what}, expected positive numbers")


@dataclass(frozen=True)
class ScaleTypes(Requirement):
    """A quantizer's scale has the type of its data, and a dequantizer's that of its result.

    A dequantizer has no ``output_dtype``, which the parser compares with the type of the zero point
    (10.15; 10.1 expects an integer type in any case). A quantizer divides in the scale's type,
    whatever ``precision`` says: the parser ignores it.
    """

    rule: ClassVar[str] = "scale-types"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *QDQ):
            if _is_dequantizer(node) and node.attrs.get("output_dtype"):
                what = f"output_dtype is {node.attrs['output_dtype']}, expected none"
                yield Fault(self.rule, node.name, what)
            other = node.outputs[0] if _is_dequantizer(node) else node.inputs[0]
            scale, data = _float_type(node.inputs[1]), _float_type(other)
            division = node.attrs.get("precision")
            if division and HALF_TYPES.get(division, "float32") != scale:
                what = f"precision is {division}, expected none, or the type of the scale"
                yield Fault(self.rule, node.name, what)
            if data is not None and scale != data:
                what = f"scale of {scale}, expected {data} as {other.name!r}"
                yield Fault(self.rule, node.name, what)


@dataclass(frozen=True)
class OperandTypes(Requirement):
    """Float operands that an operator's definition gives one type have one: nothing is cast."""

    rule: ClassVar[str] = "operand-types"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        versions = graph.domains()
        for node in graph.nodes:
            variables = _type_variables(node, versions.get(domain_of(node), 1))
            if not variables:
                continue
            found.checked[self.rule] += 1
            first: dict[str, tuple[Tensor, str]] = {}
            for i, tensor in enumerate(node.inputs):
                kind = _float_type(tensor)
                if kind is None:
                    continue
                known, wanted = first.setdefault(
                    variables[min(i, len(variables) - 1)], (tensor, kind)
                )
                if kind != wanted:
                    what = f"{tensor.name!r} is {kind}, expected {wanted} as {known.name!r}"
                    yield Fault(self.rule, node.name, f"{node.op}: {what}")


def _type_variables(node: Node, opset: int) -> list[str]:
    """The type variable, or the type, of each input; empty for operators outside ONNX."""
    schema = definition(node.op, domain_of(node), opset)
    return [] if schema is None else [formal.type_str for formal in schema.inputs]


@dataclass(frozen=True)
class Int4Weights(Requirement):
    """INT4 is for constants of an even number of values; blocks are along one of the last two axes.

    The parser finds their size from the shapes, so the last block is as large as the others.
    """

    rule: ClassVar[str] = "int4-weights"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in graph.nodes:
            if not is_op(node, *QDQ) or not _has_int4(node):
                continue
            found.checked[self.rule] += 1
            fault = _int4_fault(node)
            if fault:
                yield Fault(self.rule, node.name, fault)


def _int4_fault(node: Node) -> str:
    weight, scale = node.inputs[:2]
    if not _is_dequantizer(node) or not is_constant(weight):
        return "INT4 data, expected a constant weight behind DequantizeLinear"
    shape, scales = tuple(weight.shape), shape_of(scale)
    if math.prod(shape) % 2:
        return f"INT4 weight of shape {list(shape)}, expected an even number of values"
    if scales is None or len(scales) < 2 or _is_blocked(shape, scales, node.attrs):
        return ""
    return (
        f"scales of shape {list(scales)} for a weight of shape {list(shape)}, expected equal "
        "blocks along one of the last two axes"
    )


def _is_blocked(shape: tuple[int, ...], scales: Shape, attributes: Mapping[str, Any]) -> bool:
    """True where the scales are those of equal blocks, as large as the attributes say."""
    if len(scales) != len(shape):
        return False
    blocks = [(i, n, s) for i, (n, s) in enumerate(zip(shape, scales, strict=True)) if n != s]
    if len(blocks) != 1:
        return False
    axis, size, count = blocks[0]
    if axis < len(shape) - 2 or not isinstance(count, int) or not count or size % count:
        return False
    return bool(size // count == attributes.get("block_size", size // count))


@dataclass(frozen=True)
class DataScales(Requirement):
    """Activations have one constant scale per tensor."""

    rule: ClassVar[str] = "data-scales"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *QDQ):
            scale = node.inputs[1]
            if is_constant(node.inputs[0]):
                continue
            if not is_constant(scale):
                yield Fault(self.rule, node.name, "the scale is computed, expected a constant")
            elif rank(scale):
                shape = list(shape_of(scale) or ())
                yield Fault(self.rule, node.name, f"scale of shape {shape}, expected one scale")


@dataclass(frozen=True)
class WeightScales(Requirement):
    """Weights have one scale per output channel of their reader.

    ``axes``: the axis of output channels by operator; Gemm's is the other one with transB.
    """

    axes: tuple[tuple[str, int], ...]

    rule: ClassVar[str] = "weight-scales"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        axes = dict(self.axes)
        for node in _all_of(graph, found, self.rule, *axes):
            weight = _dequantizer(graph, node.inputs[1])
            if weight is None or not is_constant(weight.inputs[0]) or _has_int4(weight):
                continue
            matrix, scale = weight.inputs[:2]
            axis = axes[node.op] - (1 if node.attrs.get("transB") else 0)
            channels = (matrix.shape[axis],)
            own = weight.attrs.get("axis", 1) % (rank(matrix) or 1)
            if shape_of(scale) != channels or own != axis % (rank(matrix) or 1):
                shape = list(shape_of(scale) or ())
                yield Fault(
                    self.rule,
                    weight.name,
                    f"scale of shape {shape} on axis {own}, expected {list(channels)} on axis "
                    f"{axis}, the output channels of {node.op} {node.name!r}",
                )


@dataclass(frozen=True)
class FloatBiases(Requirement):
    """A bias is float, without a quantizer."""

    ops: tuple[str, ...] = ("Gemm", "Conv")

    rule: ClassVar[str] = "float-biases"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *self.ops):
            if len(node.inputs) <= _BIAS or not node.inputs[_BIAS].name:
                continue
            quantizer = _dequantizer(graph, node.inputs[_BIAS])
            if quantizer is not None:
                what = f"its bias is dequantized by {quantizer.name!r}, expected a float constant"
                yield Fault(self.rule, node.name, what)


@dataclass(frozen=True)
class WholeOperands(Requirement):
    """Both operands of a matrix multiplication are quantized, or neither: one gains nothing.

    A weight of 4 bits is alone: its data stays float.
    """

    ops: tuple[str, ...]

    rule: ClassVar[str] = "whole-operands"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *self.ops):
            makers = [_dequantizer(graph, t) for t in node.inputs[:2]]
            made = [maker is not None for maker in makers]
            if any(map(_has_int4, makers)):
                continue
            if made[0] != made[1]:
                which = "second" if made[0] else "first"
                what = f"{node.op} has a float {which} operand, expected both quantized or none"
                yield Fault(self.rule, node.name, what)


@dataclass(frozen=True)
class Pairs(Requirement):
    """Quantizers feed only dequantizers, and those feed only the operators ``readers``.

    A dequantizer with another reader prevents the fusion of the pair; one without a quantizer
    before it would read integers that no operator computes.
    """

    readers: tuple[str, ...]

    rule: ClassVar[str] = "pairs"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in _all_of(graph, found, self.rule, *QDQ):
            after = graph.consumers(node.outputs[0])
            if is_op(node, "QuantizeLinear"):
                strange = [n for n in after if not is_op(n, "DequantizeLinear")]
                wanted = "DequantizeLinear"
            else:
                strange = [n for n in after if not (is_layout(n) or is_op(n, *self.readers))]
                wanted = " or ".join(self.readers)
                if not (is_constant(node.inputs[0]) or _is_quantized(graph, node.inputs[0])):
                    what = f"reads {node.inputs[0].name!r}, expected what QuantizeLinear makes"
                    yield Fault(self.rule, node.name, what)
            for reader in strange:
                what = f"{reader.op} {reader.name!r} reads it, expected {wanted}"
                yield Fault(self.rule, node.name, what)


def _is_quantized(graph: Graph, tensor: Tensor) -> bool:
    maker = graph.producer(tensor)
    return maker is not None and is_op(maker, "QuantizeLinear")


@dataclass(frozen=True)
class Opsets(Requirement):
    """Operators come from these domains, in at most these opsets."""

    newest: tuple[tuple[str, int], ...]

    rule: ClassVar[str] = "operators"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        known = dict(self.newest)
        versions = graph.domains()
        for node in graph.nodes:
            found.checked[self.rule] += 1
            domain = domain_of(node)
            name = domain or "ai.onnx"
            wanted = ", ".join(f"{d or 'ai.onnx'} to {v}" for d, v in self.newest)
            if domain not in known:
                what = f"{node.op} is of domain {name!r}, expected {wanted}"
                yield Fault(self.rule, node.name, what)
            elif versions.get(domain, 1) > known[domain]:
                what = f"{node.op} in opset {versions[domain]} of {name}, expected {wanted}"
                yield Fault(self.rule, node.name, what)


def _all_of(graph: Graph, found: Findings, rule: str, *ops: str) -> Iterator[Node]:
    for node in graph.nodes:
        if is_op(node, *ops):
            found.checked[rule] += 1
            yield node
