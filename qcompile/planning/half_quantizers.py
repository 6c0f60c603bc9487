"""Which quantizers of a graph cannot compute in float16, and why.

A scale must be a float16 number, or near one, and what a dequantizer returns must not exceed
float16. If one operand of a matrix multiplication is dequantized in float32, so are the others: a
Cast between a dequantizer and its reader would keep runtimes from fusing them into an integer
kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_layout, is_op
from qcompile.ir.quantized_operators import QDQ
from qcompile.quant import Array

LARGEST = float(np.finfo(np.float16).max)
_ERROR = 2.0**-10  # of a scale, relative; that of a normal float16 number is up to 2^-11
_OPERANDS = 2  # the first inputs of a reader; a bias after them may be cast


def float32_quantizers(graph: Graph, readers: Collection[str] = ()) -> dict[str, Refusal]:
    """Names of QuantizeLinear and DequantizeLinear nodes that stay in float32, with the reason.

    ``readers``: names of nodes that read in float32, whatever their operands are.
    """
    found = {n.name: r for n in graph.nodes if is_op(n, *QDQ) and (r := _obstacle(n)) is not None}
    for reader in (n for n in graph.nodes if n.name in readers):
        wide = Refusal(f"{reader.op} {reader.name!r} computes in float32")
        found = {m.name: wide for m in operand_dequantizers(graph, reader)} | found
    spread = bool(found)
    while spread:
        spread = False
        for reader in graph.nodes:
            makers = list(operand_dequantizers(graph, reader))
            if not any(m.name in found for m in makers):
                continue
            for other in (m for m in makers if m.name not in found):
                why = f"{reader.op} {reader.name!r} also reads what is dequantized in float32"
                found[other.name] = Refusal(why)
                spread = True
    return found


def operand_dequantizers(graph: Graph, reader: Node) -> Iterator[Node]:
    """The DequantizeLinear nodes of the first two inputs, also behind layout operators."""
    for tensor in reader.inputs[:_OPERANDS] if not is_layout(reader) else ():
        node = graph.producer(tensor)
        while node is not None and is_layout(node):
            node = graph.producer(node.inputs[0])
        if node is not None and is_op(node, "DequantizeLinear"):
            yield node


def _obstacle(node: Node) -> Refusal | None:
    scale = node.inputs[1]
    if not is_constant(scale):
        return Refusal("its scale is computed")
    values = array(scale).astype(np.float64)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float64)
    if not (np.abs(half - values) <= _ERROR * np.abs(values)).all():
        return Refusal(f"float16 cannot hold its scale {scale.name!r}")
    integers = _integers(node)
    if integers is None:
        return Refusal("the type of its integers is not known")
    if integers.itemsize > 1:
        return Refusal(f"{integers.name} has more digits than float16")
    if is_op(node, "DequantizeLinear"):
        largest = float(half.max(initial=0)) * _farthest(node, integers)
        if largest > LARGEST:
            return Refusal(f"its results reach {largest:,.0f}, and float16 ends at {LARGEST:,.0f}")
    return None


def _integers(node: Node) -> np.dtype[Any] | None:
    """The type of the integers: of the zero point, or of what a dequantizer reads."""
    has_zero = len(node.inputs) > 2 and bool(node.inputs[2].name)
    typed: Tensor | None = node.inputs[2] if has_zero else None
    if typed is None and is_op(node, "DequantizeLinear"):
        typed = node.inputs[0]
    if typed is None:
        return np.dtype(np.uint8)  # ONNX QuantizeLinear without a zero point
    try:
        return None if typed.dtype is None else np.dtype(typed.dtype)
    except TypeError:  # an ONNX enum for a type that numpy lacks
        return None


def _farthest(node: Node, integers: np.dtype[Any]) -> float:
    """The largest distance of an integer from the zero point."""
    zero: Array = np.zeros(1)
    if len(node.inputs) > 2 and is_constant(node.inputs[2]):
        zero = array(node.inputs[2]).astype(np.float64)
    if is_constant(node.inputs[0]):
        codes = array(node.inputs[0]).astype(np.int32)
        low, high = float(codes.min(initial=0)), float(codes.max(initial=0))
    elif integers.kind in "iu":
        low, high = float(np.iinfo(integers).min), float(np.iinfo(integers).max)
    else:  # int4 and the like, from ml_dtypes
        low, high = -8.0, 15.0
    return float(max(high - zero.min(initial=0), zero.max(initial=0) - low))
