"""Recognizes what is quantized already in an input model, and which of its weights are.

Three patterns: Q/DQ pairs; quantized operators (MatMulInteger, QLinear*, those of com.microsoft);
and int8 constants that Cast, Sub and Mul convert to float. All are left unchanged: quantizing them
again would round twice.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_op, rank
from qcompile.ir.model_io.node_proto import element_type
from qcompile.ir.operators import MOVERS
from qcompile.ir.quantized_operators import quantized_operator
from qcompile.quant import Array

IN_INPUT = "its weight is already quantized in the input model"
BROUGHT = "it has a quantizer in the input model"
# Operators between an int8 constant and the operator that reads it as a float weight.
_PASS_WEIGHT = (
    *MOVERS, "Cast", "DequantizeLinear", "Mul", "Sub", "com.microsoft.DequantizeLinear",
)  # fmt: skip
_INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8))
_STORED = ("INT2", "INT4", "INT8", "UINT2", "UINT4", "UINT8")
_INTEGER_TYPES = {number for name, number in onnx.TensorProto.DataType.items() if name in _STORED}


def is_quantized_weight(graph: Graph, tensor: Tensor) -> bool:
    """True where a float tensor is computed from an int8 or 4-bit constant of rank 2 or more."""
    node = graph.producer(tensor)
    while node is not None and is_op(node, *_PASS_WEIGHT):
        if any(_is_integer_constant(t) for t in node.inputs):
            return True
        made = [m for t in node.inputs if (m := graph.producer(t)) is not None]
        node = made[0] if len(made) == 1 else None
    return False


def keeps_integers(node: Node) -> bool:
    """True for a Cast of quantized weights to float, which is not folded: that would take four
    times the bytes.
    """
    return is_op(node, "Cast") and _is_integer_constant(node.inputs[0])


def _is_integer_constant(tensor: Tensor) -> bool:
    if not is_constant(tensor) or (rank(tensor) or 0) < 2:
        return False
    return element_type(tensor.dtype) in _INTEGER_TYPES


def has_quantizer(graph: Graph, tensor: Tensor) -> bool:
    """True where data comes from a quantizer of the model with a constant 8-bit scale."""
    dequantizer = graph.producer(tensor, "DequantizeLinear")
    if dequantizer is None or graph.producer(dequantizer.inputs[0], "QuantizeLinear") is None:
        return False
    parameters = dequantizer.inputs[1:]
    return bool(dequantizer.inputs[0].dtype in _INTEGERS) and all(
        is_constant(t) and not rank(t) for t in parameters
    )


def is_quantized_next(graph: Graph, tensor: Tensor) -> bool:
    """True where all that reads a tensor are quantizers of the model."""
    readers = graph.consumers(tensor)
    return bool(readers) and all(is_op(n, "QuantizeLinear") for n in readers)


def bias_values(graph: Graph, bias: Tensor) -> Array | None:
    """The values of a constant bias in float, None where it is computed.

    Of an int32 constant behind DequantizeLinear ``q · s`` in float32; int32 has no zero point.
    """
    if is_constant(bias):
        return array(bias)
    dequantizer = graph.producer(bias, "DequantizeLinear")
    if dequantizer is None or not all(map(is_constant, dequantizer.inputs)):
        return None
    values, scale = (array(t) for t in dequantizer.inputs[:2])
    if values.dtype != np.int32 or values.ndim > 1 or scale.dtype != np.float32:
        return None
    return values.astype(np.float32) * scale


def constant_bias(graph: Graph, bias: Tensor) -> Tensor:
    """A new float constant for an int32 constant behind DequantizeLinear; any other bias itself."""
    values = bias_values(graph, bias)
    if is_constant(bias) or values is None:
        return bias
    return graph.constant(f"{bias.name}/float", values)


def inventory(graph: Graph) -> str:
    """Quantized operators and weights in words, such as ``12 MatMulInteger``; "" for none."""
    names = [n.op for n in graph.nodes if quantized_operator(n) is not None]
    names += ["integer weights with Cast" for n in graph.nodes if keeps_integers(n)]
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items()))


def scale_arithmetic(graph: Graph) -> set[str]:
    """Names of the scales in the arithmetic after a dynamically quantized MatMulInteger.

    In ``Mul(Cast(MatMulInteger), Mul(a_scale, b_scale))`` these tensors are float, but not data.
    """
    found = {n.outputs[1].name for n in graph.nodes if is_op(n, "DynamicQuantizeLinear")}
    for node in graph.nodes:
        if not is_op(node, "Mul") or not any(t.name in found for t in node.inputs):
            continue
        makers = [graph.producer(t) for t in node.inputs]
        found |= {t.name for t in node.inputs}
        if not any(m is not None and is_op(m, "Cast") for m in makers):
            found.add(node.outputs[0].name)
    return found


def compiled_before(graph: Graph) -> str:
    """Which qcompile made the model, for a message; "" where another tool did."""
    version, target = (
        graph.header.metadata.get(f"qcompile.{key}") for key in ("version", "target")
    )
    return "" if version is None else f" by qcompile {version} for target {target}"
