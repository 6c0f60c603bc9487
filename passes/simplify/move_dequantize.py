"""Moves the DequantizeLinear of an integer weight behind operators that only move its values.

    Transpose(DequantizeLinear(@q, s, z))      →   DequantizeLinear(@q transposed, s, z)
    Gather(DequantizeLinear(@q, s, z), i)      →   DequantizeLinear(Gather(@q, i), s, z)

Models trained with fake quantization quantize a weight as the framework stores it, and transpose it
in front of the product. The integers are transposed now, and the product reads a dequantized
constant, as the passes after this one and ONNX Runtime expect. Bit-equal: the scale of each value
stays the same. Refuses reshapes that split or join the axis of the scales, a Gather from a table
with a scale per row (``lower-embeddings`` has a form for it), and scales by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_op, rank, shape_of
from qcompile.ir.operators import MOVERS, RESHAPES
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_INTEGERS = (np.int8, np.uint8)


@dataclass(frozen=True)
class _Match:
    """A mover, the DequantizeLinear before it, and the axis of the scales after it, if any."""

    node: Node
    dequantizer: Node
    axis: int | None


@dataclass(frozen=True)
class MoveDequantize(NodeRewrite[_Match]):
    """Let layout operators move integer weights before they are dequantized."""

    name: ClassVar[str] = "move-dequantize"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT
    ops: ClassVar[tuple[str, ...]] = (*MOVERS, "Gather", "Identity")

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        dequantizer = graph.producer(node.inputs[0], "DequantizeLinear") if node.inputs else None
        if dequantizer is None or not _dequantizes_weight(dequantizer):
            return None
        if graph.is_output(node.outputs[0]):
            return Refusal("it carries the name of a graph output")
        if dequantizer.attrs.get("block_size"):
            return Refusal("the scales are by block")
        axis = _axis(dequantizer)
        if axis is None:
            unknown = is_op(node, *RESHAPES) and _fixed_shape(node.outputs[0]) is None
            return Refusal("its shape is computed") if unknown else _Match(node, dequantizer, None)
        moved = _moved_axis(node, dequantizer.inputs[0], axis)
        return moved if isinstance(moved, Refusal) else _Match(node, dequantizer, moved)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        node, dequantizer = match.node, match.dequantizer
        quantized = dequantizer.inputs[0]
        if is_op(node, "Gather"):
            out = node.outputs[0]
            rows = graph.add(
                "Gather", [quantized, node.inputs[1]], [f"{out.name}/rows"], node.attrs
            )
            moved: Tensor = rows.outputs[0]
            moved.dtype, moved.shape = quantized.dtype, out.shape
        else:
            moved = graph.constant(f"{quantized.name}/moved", _moved(node, array(quantized)))
        attrs = {} if match.axis is None else {"axis": match.axis}
        inputs = [moved, *dequantizer.inputs[1:]]
        graph.substitute(node.outputs[0], "DequantizeLinear", inputs, "dequantized", attrs)


def _dequantizes_weight(node: Node) -> bool:
    """True for integers of 8 bits and scales that are all constant."""
    values = node.inputs[0]
    return all(is_constant(t) for t in node.inputs) and values.dtype in _INTEGERS


def _axis(dequantizer: Node) -> int | None:
    """The axis of the scales, None where there is one for all values."""
    values, scale = dequantizer.inputs[:2]
    dims = rank(values) or 0
    if prod(scale.shape) == 1 and not rank(scale):
        return None
    return int(dequantizer.attrs.get("axis", 1)) % max(dims, 1)


def _fixed_shape(tensor: Tensor) -> tuple[int, ...] | None:
    shape = shape_of(tensor)
    known = tuple(d for d in shape or () if isinstance(d, int))
    return known if shape is not None and len(known) == len(shape) else None


def _moved_axis(node: Node, values: Tensor, axis: int) -> int | Refusal:
    """Where a mover puts an axis."""
    if is_op(node, "Identity"):
        return axis
    if is_op(node, "Transpose"):
        return _permutation(node, len(values.shape)).index(axis)
    if is_op(node, "Gather"):
        return Refusal("the table has a scale per row or column")
    before, after = tuple(values.shape), _fixed_shape(node.outputs[0])
    if after is None:
        return Refusal("its shape is computed")
    same = (
        i
        for i, size in enumerate(after)
        if size == before[axis] and prod(after[:i]) == prod(before[:axis])
    )
    found = next(same, None)
    return Refusal("it splits or joins the axis of the scales") if found is None else found


def _moved(node: Node, values: Array) -> Array:
    if is_op(node, "Transpose"):
        return np.ascontiguousarray(values.transpose(_permutation(node, values.ndim)))
    shape = values.shape if is_op(node, "Identity") else _fixed_shape(node.outputs[0])
    return values.reshape(shape or ())


def _permutation(node: Node, dims: int) -> list[int]:
    return list(node.attrs.get("perm", range(dims)[::-1]))
