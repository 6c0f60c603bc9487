"""Stores a linear layer's weight in blocks of 8, 4 or 2 bits.

    MatMul(x, DQ(Wq, t))   →   com.microsoft.MatMulNBits(x, W8, t per block) {bits=8}

Weights whose int8 values need few bits, as the plan asked for, are written in 4 or 2 bits with
exactly these values; the multipliers of their blocks are in the scales. ONNX Runtime quantizes the
data itself, per row and block (accuracy_level 4): without that, 8-bit weights have no kernel and
the whole matrix is dequantized in every call. A bias stays an Add, which the runtime fuses. Rows
shorter than a block are padded to the next power of two only. With option ``bits=4``, weights that
need more are rounded again: each block then has its own scale, which maps the value farthest
from zero to -8, so that all 16 steps are used. Refuses weights that are not symmetric int8 per
output channel, and Gemm with transA, alpha or beta; codes that fit no block of the operator are
stored in more bits. Source: ONNX Runtime matmul_nbits.
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
from qcompile.planning import BlockRows, Context, block_rows, fitting_block
from qcompile.quant import Array, sqnr_db
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_SIZES = (16, 32, 64, 128, 256)
# The smallest and largest block of each width; for 2 bits, of those that have a kernel.
_BLOCKS = {2: (32, 128), 4: (16, 256), 8: (16, 256)}
_QUANTIZES = 4  # the accuracy_level at which the operator quantizes its data


@dataclass(frozen=True)
class LowerWeightOnly(NodeRewrite[tuple[Node, Node]]):
    """Lower dequantized weights to MatMulNBits.

    bits: 8 to keep each weight's values; 4 to round those again that need more. block: how many
    values share a scale at most, a power of two from 16 to 256. accuracy: ``accuracy_level`` of the
    operator; 4 quantizes the data to 8 bits, 0 does not. fewest: least bits that the runtime reads.
    """

    bits: int = 8
    block: int = 128
    accuracy: int = 4
    fewest: int = 2

    name: ClassVar[str] = "lower-weight-only"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")

    def __post_init__(self) -> None:
        if self.block not in _SIZES:
            raise ValueError(f"block is {self.block}, expected 16, 32, 64, 128 or 256")
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, expected 4 or 8")
        if self.accuracy not in range(5):
            raise ValueError(f"accuracy is {self.accuracy}, expected 0 to 4")
        if self.fewest not in _BLOCKS:
            raise ValueError(f"fewest is {self.fewest}, expected 2, 4 or 8")

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the MatMul or Gemm, the DequantizeLinear of its weight)."""
        weight = graph.producer(node.inputs[1], "DequantizeLinear")
        if weight is None:
            return None
        return _obstacle(graph, node, weight) or (node, weight)

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        node, weight = match
        rows, noise = self._rows(ctx, node, weight)
        if rows.refusal is not None:
            ctx.skip(node, rows.refusal.reason)
        packed = graph.constant(f"{weight.inputs[0].name}/blocks", rows.packed)
        scale = graph.constant(f"{weight.inputs[1].name}/blocks", rows.scales.reshape(-1))
        for new, old in ((packed, weight.inputs[0]), (scale, weight.inputs[1])):
            origin, old_noise = ctx.origins.get(old.name, (old.name, None))
            keep_old = noise is None or old_noise is None
            ctx.origins[new.name] = origin, old_noise if keep_old else noise
        attrs = {
            "K": rows.codes.shape[1],
            "N": rows.codes.shape[0],
            "bits": rows.bits,
            "block_size": rows.block,
            **({"accuracy_level": self.accuracy} if self.accuracy else {}),
        }
        out = node.outputs[0]
        lowered = graph.add(
            "MatMulNBits",
            [node.inputs[0], packed, scale],
            [f"{out.name}/{rows.bits}bit"],
            attrs,
            domain=MICROSOFT,
            name=f"{node.name}/{rows.bits}bit",
            like=out,
        )
        result = lowered.outputs[0]
        if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2].name:
            result = graph.add("Add", [result, node.inputs[2]], [f"{out.name}/biased"]).outputs[0]
        graph.replace_uses(out, result)
        self._remark(ctx, node)

    def _rows(self, ctx: Context, node: Node, weight: Node) -> tuple[BlockRows, float | None]:
        """The weight in blocks, and in dB its SQNR where it was rounded again."""
        values, scale = map(array, weight.inputs[:2])
        rows = values if node.attrs.get("transB") else values.T  # one row per output channel
        found = block_rows(rows, scale, self._blocks(ctx))
        if found.bits <= self.bits:
            return found, None
        return _rounded(rows * scale[:, None], fitting_block(_SIZES[0], self.block, rows.shape[1]))

    def _blocks(self, ctx: Context) -> dict[int, tuple[int, int]]:
        """Fewer than 8 bits where the plan asks for them, not where values happen to need them."""
        few = any(d.spec is not None and d.spec.width for d in ctx.plan.decisions)
        return {
            bits: (least, min(largest, max(least, self.block)))
            for bits, (least, largest) in _BLOCKS.items()
            if bits >= (self.fewest if few else 8)
        }

    def _remark(self, ctx: Context, node: Node) -> None:
        """Say what the operator does to the data, and where another mode is faster."""
        if self.accuracy == _QUANTIZES:
            ctx.remarks["weight-only-data"] = (
                "MatMulNBits rounds the data of linear layers to 8 bits, for each row and block "
                "(accuracy_level 4); recipe forms 'weight-only-data: float' keeps it float"
            )
        integers = ctx.target.rule(node.op, "static")
        if integers is not None and integers.activation is not None:
            ctx.remarks["weight-only-speed"] = (
                "weight-only saves memory, and time for one or two rows of data (tokens times "
                "batch); for more, modes static and dynamic are faster, with as few bits in the "
                "file, since their weights are int8 once loaded (docs/targets.md)"
            )


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


def _rounded(rows: Array, block: int) -> tuple[BlockRows, float]:
    """float [N, K] to 4 bits with a scale per block, and SQNR in dB."""
    n, k = rows.shape
    count = -(-k // block)
    padded = np.zeros((n, count * block), np.float32)
    padded[:, :k] = rows
    values = padded.reshape(n, count, block)
    farthest = np.take_along_axis(values, np.abs(values).argmax(2)[..., None], 2)
    scale = np.where(farthest == 0, np.float32(1), farthest / np.float32(-8))
    steps = np.clip(np.rint(values / scale), -8, 7)
    codes = (steps + 8).astype(np.uint8).reshape(n, -1)[:, :k]
    found = BlockRows(codes, scale[..., 0].astype(np.float32), 4, block)
    return found, sqnr_db(values, steps * scale)
