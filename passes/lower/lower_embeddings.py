"""Dequantizes only the rows that are looked up, instead of the whole table.

    Gather(DQ(Tq, s, axis=0), i)              →   Mul(Cast(Gather(Tq, i)), Gather(s[V,1], i))
    Gather(Transpose(DQ(Wq, s, axis=1)), i)   →   the same with Tq = Transpose(Wq)

    form=packed:  Gather(DQ(Tq, s, axis=0), i)   →   com.microsoft.GatherBlockQuantized(T4, i, s)
    form=int4:    the same with T4 as INT4, in blocks that end where rows do

ONNX Runtime does not move a DequantizeLinear after a Gather: it would dequantize the table in every
run. There is one scale per row. The Transpose of a constant is computed when the model is loaded.
Unpacked tables have 8 bits in memory, whatever they have in the file. Packed ones have 8, 4 or 2
bits in both. INT4 is for providers that read codes in bytes in another way: such tables have 4 bits
where the plan asks for at most as many, the others are unpacked. A table whose integers are also
the weight of a MatMulNBits is looked up in that weight in any form, so that it is stored once.
Refuses tables that are not symmetric int8 per row, and lookups along another axis; to pack a table
that others read as int8, or that is a layer's weight; and INT4 for rows that are no multiple of 16
values.
Source: ONNX Runtime gather_block_quantized.cc of both providers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import (
    MICROSOFT,
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    is_constant,
    is_op,
    is_zero,
    rank,
    shape_of,
)
from qcompile.planning import BlockRows, Context, block_rows
from qcompile.quant import Array
from qcompile.rewriting import NodeRewrite, Numerics, Stage

_OP = "GatherBlockQuantized"
_TWICE = "the table is also a layer's int8 weight: packed, it would be stored twice"
_FORMS = ("unpacked", "packed", "int4")
_INT4 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)
_ROWS = 0, -2  # the axis of a lookup in a matrix
_BLOCK = 16, 1 << 30  # of GatherBlockQuantized; a block may be longer than a row


@dataclass(frozen=True)
class LowerEmbeddings(NodeRewrite[tuple[Node, Node]]):
    """Apply an embedding's scale after the lookup.

    form: unpacked; packed, for tables with few bits in memory too; int4, the same for CUDA. tied:
    whether rows are looked up in a layer's weight; CUDA's kernel mixes up blocks that do not end
    where rows do.
    """

    form: str = "unpacked"
    tied: bool = True

    name: ClassVar[str] = "lower-embeddings"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("Gather",)

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise ValueError(f"form is {self.form!r}, expected {' or '.join(_FORMS)}")

    def match(self, graph: Graph, ctx: Context, node: Node) -> tuple[Node, Node] | Refusal | None:
        """(the lookup, the DequantizeLinear of its table)."""
        turned = _transpose(graph, node)
        source = node.inputs[0] if turned is None else turned.inputs[0]
        table = graph.producer(source, "DequantizeLinear")
        if table is None:
            return None
        rows = 0 if turned is None else 1
        return _obstacle(node, table, rows) or (node, table)

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Node, Node]) -> None:
        node, table = match
        values, scale = map(array, table.inputs[:2])
        rows = values if _transpose(graph, node) is None else values.T
        layer = _layer_of(graph, rows, scale) if self.tied else None
        if layer is not None:
            _look_up_in_layer(graph, node, layer, rows.shape[1])
            return
        packed = self._packed(graph, ctx, table, rows)
        if isinstance(packed, Refusal):
            ctx.skip(node, packed.reason)
        if isinstance(packed, BlockRows):
            _look_up_packed(graph, ctx, node, table, packed, is_int4=self.form == "int4")
        else:
            _look_up_unpacked(graph, ctx, node, table)

    def _packed(
        self, graph: Graph, ctx: Context, table: Node, values: Array
    ) -> BlockRows | Refusal | None:
        """A table, int8 (rows, channels), in few bits; None where the form leaves it as it is."""
        is_few = any(d.spec is not None and d.spec.width for d in ctx.plan.decisions)
        if self.form == "unpacked" or (self.form == "int4" and not is_few):
            return None
        refusal = _why_unpacked(graph, table)
        if refusal is not None:
            return refusal
        scale = array(table.inputs[1])
        return _packed_rows(values, scale) if self.form == "packed" else _int4_rows(values, scale)


def _look_up_unpacked(graph: Graph, ctx: Context, node: Node, table: Node) -> None:
    quantized, scale = table.inputs[:2]
    turned = _transpose(graph, node)
    if turned is not None:
        name = f"{quantized.name}/transposed"
        quantized = graph.add("Transpose", [quantized], [name], turned.attrs).outputs[0]
    indices, out = node.inputs[1], node.outputs[0]
    column = graph.constant(f"{scale.name}/column", array(scale).reshape(-1, 1))
    ctx.origins[column.name] = ctx.origins.get(scale.name, (scale.name, None))
    rows = graph.add("Gather", [quantized, indices], [f"{out.name}/rows"], {"axis": 0})
    kind = onnx.helper.np_dtype_to_tensor_dtype(scale.dtype)  # float16 where the model has that
    real = graph.add("Cast", [rows.outputs[0]], [f"{out.name}/cast"], {"to": int(kind)})
    scales = graph.add("Gather", [column, indices], [f"{out.name}/scales"], {"axis": 0})
    graph.substitute(out, "Mul", [real.outputs[0], scales.outputs[0]], "scaled")


def _look_up_packed(
    graph: Graph, ctx: Context, node: Node, table: Node, rows: BlockRows, *, is_int4: bool
) -> None:
    """Write the table in few bits, in bytes or as INT4."""
    if rows.refusal is not None:
        ctx.skip(node, rows.refusal.reason)
    width = rows.codes.shape[1] * rows.bits // 8
    stored = rows.packed.reshape(len(rows.codes), -1)[:, :width]
    if is_int4:
        stored = (rows.codes.astype(np.int8) - np.int8(8)).astype(_INT4)
    packed = graph.constant(f"{table.inputs[0].name}/blocks", stored)
    scales = _scales_read_with(graph, packed, rows.scales)
    if scales is None:
        scales = graph.constant(f"{table.inputs[1].name}/blocks", rows.scales)
    for old, new in zip(table.inputs[:2], (packed, scales), strict=True):
        ctx.origins[new.name] = ctx.origins.get(old.name, (old.name, None))
    attrs = _attributes(rows.bits, rows.block)
    inputs = [packed, node.inputs[1], scales]
    graph.substitute(node.outputs[0], _OP, inputs, "looked-up", attrs, domain=MICROSOFT)


def _scales_read_with(graph: Graph, packed: Tensor, scales: Array) -> Tensor | None:
    """The constant of these scales that another lookup in the same packed table reads."""
    read = (n.inputs[2] for n in graph.consumers(packed) if is_op(n, f"{MICROSOFT}.{_OP}"))
    return next((t for t in read if is_constant(t) and np.array_equal(array(t), scales)), None)


def _packed_rows(values: Array, scale: Array) -> BlockRows:
    """A table in the fewest bits in which its rows are whole bytes."""
    return block_rows(values, scale, {b: _BLOCK for b in (2, 4, 8) if values.shape[1] * b % 8 == 0})


def _int4_rows(values: Array, scale: Array) -> BlockRows | Refusal | None:
    """A table in INT4, None where it needs 8 bits: that form reads no others.

    CUDA's kernel takes the block of the value's place in the whole table, so that rows must be
    whole blocks. Of codes in bytes, its versions take another zero point, or mix up rows; of INT4,
    all take the zero point 0.
    """
    channels = values.shape[1]
    block = channels & -channels  # the largest power of two that divides a row
    if block < _BLOCK[0]:
        least = _BLOCK[0]
        return Refusal(f"rows of {channels} values are no whole blocks of {least} or more: int8")
    rows = block_rows(values, scale, {4: (_BLOCK[0], block), 8: (_BLOCK[0], block)})
    return rows if rows.bits == 4 else None  # 5 to 7 bits, as the decision says


def _look_up_in_layer(graph: Graph, node: Node, layer: Node, channels: int) -> None:
    """Look rows up in the weight of a MatMulNBits, without what fills its last block.

    The weight's other shape is computed when the model is loaded.
    """
    out, bits, block = node.outputs[0], layer.attrs["bits"], layer.attrs["block_size"]
    rows, scales = (
        _computed(graph, "Reshape", tensor, [np.array([layer.attrs["N"], -1])])
        for tensor in layer.inputs[1:3]
    )
    if channels % block:
        ends = (np.array([n]) for n in (0, channels * bits // 8, 1))
        rows = _computed(graph, "Slice", rows, ends)
    inputs = [rows, node.inputs[1], scales]
    graph.substitute(out, _OP, inputs, "looked-up", _attributes(bits, block), domain=MICROSOFT)


def _computed(graph: Graph, op: str, tensor: Tensor, operands: Iterable[Array]) -> Tensor:
    constants = [graph.constant(f"{tensor.name}/{op}-operand", values) for values in operands]
    made: Tensor = graph.add(op, [tensor, *constants], [f"{tensor.name}/{op}"]).outputs[0]
    made.dtype = tensor.dtype
    return made


def _attributes(bits: int, block: int) -> dict[str, int]:
    """All of them, since providers differ in what they take for missing ones."""
    return {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}


def _layer_of(graph: Graph, values: Array, scale: Array) -> Node | None:
    """The MatMulNBits whose weight is a table: int8 (rows, channels), scales (rows,)."""
    for node in graph.nodes:
        if not is_op(node, f"{MICROSOFT}.MatMulNBits") or len(node.inputs) != 3:
            continue
        bits, block = node.attrs["bits"], node.attrs["block_size"]
        whole = values.shape[1] * bits % 8 == 0  # bytes in a row
        same_shape = values.shape == (node.attrs["N"], node.attrs["K"])
        if not (whole and same_shape) or not all(map(is_constant, node.inputs[1:])):
            continue
        rows = block_rows(values, scale, dict.fromkeys((bits, 8), (block, block)))
        same = np.array_equal(rows.packed, array(node.inputs[1]))
        if same and np.array_equal(rows.scales.reshape(-1), array(node.inputs[2]).reshape(-1)):
            return node
    return None


def _why_unpacked(graph: Graph, table: Node) -> Refusal | None:
    """Why a packed table would be stored in addition to the int8 one, None where it would not."""
    values, real = table.inputs[0], table.outputs[0]
    if any(reader is not table for reader in graph.consumers(values)) or graph.is_output(values):
        return Refusal(_TWICE)
    if any(_is_turned(values, other) for other in graph.constants().values()):
        return Refusal(_TWICE)
    if not _is_looked_up(graph, real):
        return Refusal("not only lookups read the table: packed, it would be stored twice")
    return None


def _is_turned(values: Tensor, other: Tensor) -> bool:
    """True for an int8 matrix with the values of another, transposed, as a layer reads them."""
    shape = tuple(values.shape)[::-1]
    return (
        other is not values
        and other.dtype == np.int8
        and tuple(other.shape) == shape
        and np.array_equal(array(other), array(values).T)
    )


def _is_looked_up(graph: Graph, table: Tensor) -> bool:
    """True where all readers look up rows, also behind a Transpose."""
    return not graph.is_output(table) and all(
        _is_looked_up(graph, reader.outputs[0])
        if is_op(reader, "Transpose")
        else is_op(reader, "Gather") and reader.attrs.get("axis", 0) in _ROWS
        for reader in graph.consumers(table)
    )


def _transpose(graph: Graph, node: Node) -> Node | None:
    """The Transpose of a matrix in which rows are looked up, None where there is none."""
    turned = graph.producer(node.inputs[0], "Transpose")
    return turned if turned is not None and turned.attrs.get("perm") == [1, 0] else None


def _obstacle(node: Node, table: Node, axis: int) -> Refusal | None:
    """Why the rows, along an axis of what is dequantized, cannot be looked up as integers."""
    matrix, scale = table.inputs[:2]
    if not is_constant(matrix) or rank(matrix) != 2:
        return Refusal("the table is not a constant matrix")
    if matrix.dtype != np.int8 or not all(is_zero(t) for t in table.inputs[2:]):
        return Refusal("the table is not symmetric int8")
    along = table.attrs.get("axis", 1) in (axis, axis - 2)
    by_row = shape_of(scale) == (matrix.shape[axis],) and along
    if not is_constant(scale) or not by_row:
        return Refusal("the table does not have one scale per row")
    if node.attrs.get("axis", 0) not in _ROWS:
        return Refusal("the lookup is not along the rows of the table")
    return None
