"""Gives the quantizers that a model brings the integer types for which there are fast kernels.

    QuantizeLinear(x, s, z : int8)               →   QuantizeLinear(x, s, z + 128 : uint8)
    DequantizeLinear(@w : uint8, s, z : uint8)   →   DequantizeLinear(@w - 128 : int8, s, z - 128)
    QuantizeLinear(x, s)                         →   QuantizeLinear(x, s, 0 : uint8)

On x64 only uint8 data by int8 weights has a vector kernel. Bit-equal: integers and zero points move
together, so that each integer stands for the same number, and both types saturate at the same
numbers. Refuses zero points that are computed or by channel, quantized data that others than
DequantizeLinear read, and right operands of matrix multiplications of data, which are to be int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_layout, is_op
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_LINEARS = ("Conv", "Gemm", "MatMul")
_SHIFT = 128


@dataclass(frozen=True)
class _Match:
    """A quantizer of data with the dequantizers that read it, or the dequantizer of a weight."""

    quantizer: Node | None
    dequantizers: tuple[Node, ...]


@dataclass(frozen=True)
class ShiftIntegers(NodeRewrite[_Match]):
    """Make data uint8 and weights int8 where the model brings them otherwise."""

    name: ClassVar[str] = "shift-integers"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("QuantizeLinear", "DequantizeLinear")

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        if is_op(node, "QuantizeLinear"):
            return _data(graph, node)
        if node.inputs[0].dtype != np.uint8 or not is_constant(node.inputs[0]):
            return None
        if not any(is_op(n, *_LINEARS) and i == 1 for n, i in graph.slots(node.outputs[0])):
            return None
        computed = not all(is_constant(t) for t in node.inputs[2:])
        return Refusal("its zero point is computed") if computed else _Match(None, (node,))

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        if match.quantizer is None:
            _shift_weight(graph, ctx, match.dequantizers[0])
        else:
            _shift_data(graph, match.quantizer, match.dequantizers)


def _data(graph: Graph, quantizer: Node) -> _Match | Refusal | None:
    result = quantizer.outputs[0]
    points = quantizer.inputs[2:]
    if result.dtype == np.uint8 and points:
        return None
    if result.dtype not in (np.int8, np.uint8):
        return None
    readers = graph.consumers(result)
    if not all(is_op(n, "DequantizeLinear") for n in readers) or graph.is_output(result):
        return Refusal("operators other than DequantizeLinear read the integers")
    points = [t for n in (quantizer, *readers) for t in n.inputs[2:]]
    if any(not is_constant(t) or array(t).size != 1 for t in points):
        return Refusal("a zero point is computed, or there is one per channel")
    if any(_multiplied_from_right(graph, n.outputs[0]) for n in readers):
        return Refusal("right operands of matrix multiplications are to be int8")
    return _Match(quantizer, tuple(readers))


def _multiplied_from_right(graph: Graph, tensor: Tensor) -> bool:
    """True where a matrix multiplication reads a tensor, or what layout operators make of it."""
    for node, slot in graph.slots(tensor):
        if is_op(node, "MatMul", "Gemm") and slot == 1:
            return True
        if is_layout(node) and any(_multiplied_from_right(graph, t) for t in node.outputs):
            return True
    return False


def _shift_data(graph: Graph, quantizer: Node, dequantizers: tuple[Node, ...]) -> None:
    """Quantize to uint8; in ONNX, a zero point that is left out is 0 and uint8."""
    signed = quantizer.outputs[0].dtype == np.int8
    source, scale = quantizer.inputs[:2]
    result = quantizer.outputs[0]
    attrs = {k: v for k, v in quantizer.attrs.items() if k != "output_dtype"}
    operands = [source, scale, _unsigned(graph, quantizer, signed)]
    new = graph.substitute(result, "QuantizeLinear", operands, "uint8", attrs).outputs[0]
    new.dtype = np.dtype(np.uint8)
    for node in dequantizers:
        point = _unsigned(graph, node, signed)
        if len(node.inputs) > 2:
            graph.set_input(node, 2, point)
        else:
            node.inputs.append(point)


def _unsigned(graph: Graph, node: Node, signed: bool) -> Tensor:
    """The zero point of a node for uint8."""
    old = array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.int8)
    shifted = old.astype(np.int16) + (_SHIFT if signed else 0)
    return graph.constant(f"{node.inputs[1].name}/zero_point", shifted.astype(np.uint8))


def _shift_weight(graph: Graph, ctx: Context, node: Node) -> None:
    values, scale = node.inputs[:2]
    weight = graph.constant(f"{values.name}/int8", _signed(array(values)))
    zero = array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(scale.shape, np.uint8)
    point = graph.constant(f"{weight.name}/zero_point", _signed(zero))
    for new in (weight, point):
        ctx.origins[new.name] = ctx.origins.get(values.name, (values.name, None))
    inputs = [weight, scale, point]
    graph.substitute(node.outputs[0], "DequantizeLinear", inputs, "int8", node.attrs)


def _signed(values: Array) -> Array:
    return (values.astype(np.int16) - _SHIFT).astype(np.int8)
