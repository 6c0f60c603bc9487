"""Turns quantized MatMul and Gemm into ONNX Runtime's fastest int8 matrix multiplication.

    MatMul(DQ(xq, s, z), DQ(Wq, t)) + b   →   MatMulIntegerToFloat(xq, Wq, s, t, z, , b)

The operator is int8 in every session, while ONNX Runtime may compute Q/DQ nodes in float, depending
on session options and on static shapes. The bias moves into the operator, also where it is int32
behind DequantizeLinear; the zero point of a symmetric weight is left out. Refuses weights that are
not int8 with constant scales per output channel, activations other than uint8 with one scale (those
have no vector kernel), and Gemm with transA, alpha or beta. Source: ONNX Runtime
matmul_integer_to_float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import (
    MICROSOFT,
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    is_constant,
    is_op,
    is_plain_gemm,
    is_zero,
    rank,
    scalar,
)
from qcompile.ir.analysis.prequantized import constant_bias
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class _Match:
    """A MatMul or Gemm, and the DequantizeLinear nodes of its operands."""

    node: Node
    data: Node
    weight: Node


@dataclass(frozen=True)
class LowerLinears(NodeRewrite[_Match]):
    """Lower linear layers between Q/DQ nodes to MatMulIntegerToFloat."""

    name: ClassVar[str] = "lower-linears"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        data, weight = (graph.producer(t, "DequantizeLinear") for t in node.inputs[:2])
        if data is None or weight is None:
            return None
        return _obstacle(node, data, weight) or _Match(node, data, weight)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        node, weight = match.node, match.weight
        matrix = weight.inputs[0]
        if node.attrs.get("transB"):
            matrix = graph.constant(f"{matrix.name}/transposed", array(matrix).T)
            ctx.origins[matrix.name] = ctx.origins.get(weight.inputs[0].name, (matrix.name, None))
        result, inside, outside = _bias(graph, node)
        xq, scale = match.data.inputs[:2]
        zero = match.data.inputs[2] if len(match.data.inputs) > 2 else None
        fused = [] if inside is None else [inside]
        lowered = graph.add(
            "MatMulIntegerToFloat",
            [xq, matrix, scale, weight.inputs[1], zero, _weight_zero(weight), *fused],
            [f"{result.name}/int8"],
            domain=MICROSOFT,
            name=f"{node.name}/int8",
            like=result,
        )
        replacement = lowered.outputs[0]
        if outside is not None:
            inputs = [replacement, outside]
            add = graph.add("Add", inputs, [f"{result.name}/biased"], like=result)
            replacement = add.outputs[0]
        graph.replace_uses(result, replacement)


def _obstacle(node: Node, data: Node, weight: Node) -> Refusal | None:
    if not is_plain_gemm(node):
        return Refusal("Gemm with transA, alpha or beta")
    if not is_constant(weight.inputs[0]) or rank(weight.inputs[0]) != 2:
        return Refusal("the weight is not a constant matrix")
    if weight.inputs[0].dtype != np.int8 or not all(is_constant(t) for t in weight.inputs[1:]):
        return Refusal("the weight is not int8 with constant scales")
    if data.inputs[0].dtype is not None and data.inputs[0].dtype != np.uint8:
        return Refusal("the activation is not uint8")
    if rank(data.inputs[1]) and scalar(data.inputs[1]) is None:
        return Refusal("the activation has a scale per channel")
    if not _fits_outputs(node, weight):
        return Refusal("the weight's scales are not along the output channels")
    return None


def _weight_zero(weight: Node) -> Tensor | None:
    """The weight's zero point, None where it is zero."""
    return next((t for t in weight.inputs[2:] if not is_zero(t)), None)


def _fits_outputs(node: Node, weight: Node) -> bool:
    """True for one scale, or one per output channel."""
    axes = (0, -2) if node.attrs.get("transB") else (1, -1)
    dims = rank(weight.inputs[1])
    return dims == 0 or (dims == 1 and weight.attrs.get("axis", 1) in axes)


def _bias(graph: Graph, node: Node) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(the tensor to replace, the bias vector for the operator, the bias for an Add after it)."""
    out = node.outputs[0]
    if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2].name:
        bias = constant_bias(graph, node.inputs[2])
        vector = is_constant(bias) and _is_vector(bias, node)
        return (out, _flat(graph, bias), None) if vector else (out, None, bias)
    add = graph.only_consumer(out, "Add")
    if add is None:
        return out, None, None
    other = next((t for t in add.inputs if t is not out), None)
    other = other if other is None else constant_bias(graph, other)
    if other is None or not is_constant(other) or not _is_vector(other, node):
        return out, None, None
    return add.outputs[0], _flat(graph, other), None


def _is_vector(bias: Tensor, node: Node) -> bool:
    """True where it adds one value to each output channel, and no dimension to the result."""
    columns = node.inputs[1].shape[0 if node.attrs.get("transB") else 1]
    shape = tuple(bias.shape)
    fits = len(shape) <= (rank(node.outputs[0]) or 1)
    return fits and shape[-1:] == (columns,) and int(np.prod(shape)) == columns


def _flat(graph: Graph, bias: Tensor) -> Tensor:
    if rank(bias) == 1:
        return bias
    return graph.constant(f"{bias.name}/flat", array(bias).reshape(-1))
