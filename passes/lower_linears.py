"""Turns quantized MatMul and Gemm into ONNX Runtime's fastest integer product.

    MatMul(DQ(xq, s, z), DQ(Wq, t)) + b   →   MatMulIntegerToFloat(xq, Wq, s, t, z, , b)

The operator form is independent of the session's Q/DQ options and of static shapes, which make
the Q/DQ form fall back to float. The bias moves inside, the weight's zero point is left out
(symmetric). Refuses weights that are not symmetric int8 per output channel, and activations other
than uint8: those have no vector kernel. Source: ONNX Runtime matmul_integer_to_float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.api import Context, Numerics, Pass, Stage
from qcompile.graph import MICROSOFT, Graph, Node, Tensor, array, is_constant, is_op, rank


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Lower Q/DQ products to MatMulIntegerToFloat."""

    name: ClassVar[str] = "lower-linears"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            if not is_op(node, "MatMul", "Gemm"):
                continue
            data, weight = (_dequantizer(graph, t) for t in node.inputs[:2])
            if data is None or weight is None:
                continue
            reason = _obstacle(node, data, weight)
            if reason is None:
                _lower(graph, ctx, node, data, weight)
                changed = True
            else:
                ctx.skip(node, reason)
        return bool(graph.remove_dead()) or changed


def _dequantizer(graph: Graph, tensor: Tensor) -> Node | None:
    node = graph.producer(tensor)
    return node if node is not None and is_op(node, "DequantizeLinear") else None


def _obstacle(node: Node, data: Node, weight: Node) -> str | None:
    if not is_constant(weight.inputs[0]) or rank(weight.inputs[0]) != 2:
        return "the weight is no constant matrix"
    if weight.inputs[0].dtype != np.int8 or len(weight.inputs) > 2:
        return "the weight is not symmetric int8"
    if "axis" in data.attrs:
        return "the activation has a scale per channel"
    if weight.attrs.get("axis", 1) != (0 if node.attrs.get("transB") else 1):
        return "the weight's scales are not along the output channels"
    return None


def _lower(graph: Graph, ctx: Context, node: Node, data: Node, weight: Node) -> None:
    matrix = weight.inputs[0]
    if node.attrs.get("transB"):
        matrix = graph.constant(f"{matrix.name}/transposed", array(matrix).T)
        ctx.origins[matrix.name] = ctx.origins.get(weight.inputs[0].name, (matrix.name, None))
    result, bias = _bias(graph, node)
    xq, scale, zero = data.inputs
    lowered = graph.add(
        "MatMulIntegerToFloat",
        [xq, matrix, scale, weight.inputs[1], zero, None, *([bias] if bias is not None else [])],
        [f"{result.name}/int8"],
        domain=MICROSOFT,
        name=f"{node.name}/int8",
        like=result,
    )
    graph.replace_uses(result, lowered.outputs[0])


def _bias(graph: Graph, node: Node) -> tuple[Tensor, Tensor | None]:
    """(the tensor to replace, the bias vector that goes inside, None where there is none)."""
    out = node.outputs[0]
    if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2].name:
        return _gemm_bias(graph, node)
    add = graph.only_consumer(out)
    if add is None or not is_op(add, "Add"):
        return out, None
    bias = next((t for t in add.inputs if t is not out), None)
    if bias is None or not is_constant(bias) or not _is_vector(bias, node):
        return out, None
    return add.outputs[0], _flat(graph, bias)


def _gemm_bias(graph: Graph, node: Node) -> tuple[Tensor, Tensor | None]:
    bias, out = node.inputs[2], node.outputs[0]
    if is_constant(bias) and _is_vector(bias, node):
        return out, _flat(graph, bias)
    # A bias that broadcasts otherwise is added outside, under the product's old name.
    inner = graph.add("Add", [out, bias], [f"{out.name}/biased"])
    for reader in [n for n in graph.consumers(out) if n is not inner]:
        for i, tensor in enumerate(reader.inputs):
            if tensor is out:
                graph.set_input(reader, i, inner.outputs[0])
    return out, None


def _is_vector(bias: Tensor, node: Node) -> bool:
    columns = node.inputs[1].shape[0 if node.attrs.get("transB") else 1]
    shape = tuple(bias.shape)
    return shape[-1:] == (columns,) and int(np.prod(shape)) == columns


def _flat(graph: Graph, bias: Tensor) -> Tensor:
    if rank(bias) == 1:
        return bias
    return graph.constant(f"{bias.name}/flat", array(bias).reshape(-1))
