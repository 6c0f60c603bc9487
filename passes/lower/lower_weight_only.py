"""Stores a linear layer's weight in blocks of 8 or 4 bits.

    MatMul(x, DQ(Wq, t))   →   com.microsoft.MatMulNBits(x, W8, t per block) {bits=8}

ONNX Runtime quantizes the activation itself, per row and block (accuracy_level 4): without that,
8-bit weights have no kernel and the whole matrix is dequantized in every call. A bias stays an Add,
which the runtime fuses. Rows shorter than a block are padded to the next power of two only. With
4 bits, each block has its own scale, which maps the value farthest
from zero to -8, so that all 16 steps are used. Refuses weights that are not symmetric int8 per
output channel, and Gemm with transA, alpha or beta. Source: ONNX Runtime matmul_nbits.
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
    array,
    is_constant,
    is_op,
    is_plain_gemm,
    is_zero,
    rank,
    shape_of,
)
from qcompile.planning import Context
from qcompile.quant import Array, sqnr_db
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_LEAST_BLOCK = 16


@dataclass(frozen=True)
class LowerWeightOnly(NodeRewrite[tuple[Node, Node]]):
    """Lower dequantized weights to MatMulNBits.

    bits: 8, or 4 for half the bytes. block: how many weights share a scale, a power of two from 16
    to 256. accuracy: ``accuracy_level`` of the operator; 0 does not quantize the activation.
    """

    bits: int = 8
    block: int = 128
    accuracy: int = 4

    name: ClassVar[str] = "lower-weight-only"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")

    def __post_init__(self) -> None:
        if self.block not in (_LEAST_BLOCK, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}, expected 16, 32, 64, 128 or 256")
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, expected 4 or 8")
        if self.accuracy not in range(5):
            raise ValueError(f"accuracy is {self.accuracy}, expected 0 to 4")

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the MatMul or Gemm, the DequantizeLinear of its weight)."""
        weight = graph.producer(node.inputs[1], "DequantizeLinear")
        if weight is None:
            return None
        return _obstacle(graph, node, weight) or (node, weight)

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        node, weight = match
        values = array(weight.inputs[0])
        rows = values if node.attrs.get("transB") else values.T  # one row per output channel
        block = _fitting(self.block, rows.shape[1])
        if self.bits == 8:
            blocks, sqnr = _packed(rows, block), None
            scales = np.repeat(array(weight.inputs[1]), blocks.shape[1])
        else:
            blocks, scales, sqnr = _nibbles(rows * array(weight.inputs[1])[:, None], block)
        packed = graph.constant(f"{weight.inputs[0].name}/blocks", blocks)
        scale = graph.constant(f"{weight.inputs[1].name}/blocks", scales)
        for new, old in ((packed, weight.inputs[0]), (scale, weight.inputs[1])):
            origin, old_sqnr = ctx.origins.get(old.name, (old.name, None))
            keep_old = sqnr is None or old_sqnr is None
            ctx.origins[new.name] = origin, old_sqnr if keep_old else sqnr
        attrs = {
            "K": rows.shape[1],
            "N": rows.shape[0],
            "bits": self.bits,
            "block_size": block,
            **({"accuracy_level": self.accuracy} if self.accuracy else {}),
        }
        out = node.outputs[0]
        lowered = graph.add(
            "MatMulNBits",
            [node.inputs[0], packed, scale],
            [f"{out.name}/{self.bits}bit"],
            attrs,
            domain=MICROSOFT,
            name=f"{node.name}/{self.bits}bit",
            like=out,
        )
        result = lowered.outputs[0]
        if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2].name:
            result = graph.add("Add", [result, node.inputs[2]], [f"{out.name}/biased"]).outputs[0]
        graph.replace_uses(out, result)


def _obstacle(graph: Graph, node: Node, weight: Node) -> Refusal | None:
    matrix, scale = weight.inputs[:2]
    if not is_constant(matrix) or rank(matrix) != 2:
        return Refusal("the weight is not a constant matrix")
    if matrix.dtype != np.int8 or not all(is_zero(t) for t in weight.inputs[2:]):
        return Refusal("the weight is not symmetric int8")
    axes = (0, -2) if node.attrs.get("transB") else (1, -1)
    channels = (matrix.shape[axes[0]],)
    by_output = shape_of(scale) == channels and weight.attrs.get("axis", 1) in axes
    if not is_constant(scale) or not by_output:
        return Refusal("the weight's scales are not along the output channels")
    if not is_plain_gemm(node):
        return Refusal("Gemm with transA, alpha or beta")
    if graph.producer(node.inputs[0], "DequantizeLinear") is not None:
        return Refusal("its data is quantized too: it can run in int8")
    return None


def _fitting(block: int, inputs: int) -> int:
    """The block size, or the least one that holds a whole row: the operator takes 16 or more."""
    return min(block, max(_LEAST_BLOCK, 1 << (inputs - 1).bit_length()))


def _packed(rows: Array, block: int) -> Array:
    """int8 [N, K] to uint8 [N, blocks, block] around 128, padded with zeros (128)."""
    n, k = rows.shape
    count = -(-k // block)
    padded = np.zeros((n, count * block), np.int16)
    padded[:, :k] = rows
    return (padded + 128).astype(np.uint8).reshape(n, count, block)


def _nibbles(rows: Array, block: int) -> tuple[Array, Array, float]:
    """float [N, K] to uint8 [N, blocks, block / 2], float32 scales [N · blocks], and SQNR in dB.

    Two values per byte, the first in the low half, as value + 8; the last block is padded with
    zeros (8).
    """
    n, k = rows.shape
    count = -(-k // block)
    padded = np.zeros((n, count * block), np.float32)
    padded[:, :k] = rows
    values = padded.reshape(n, count, block)
    farthest = np.take_along_axis(values, np.abs(values).argmax(2)[..., None], 2)
    scale = np.where(farthest == 0, np.float32(1), farthest / np.float32(-8))
    steps = np.clip(np.rint(values / scale), -8, 7)
    sqnr = sqnr_db(values, steps * scale)
    stored = (steps + 8).astype(np.uint8)
    pairs: Array = stored[..., 0::2] | stored[..., 1::2] << 4
    return pairs, scale.reshape(-1).astype(np.float32), sqnr
