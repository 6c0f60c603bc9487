"""Writes int8 weights whose values are codes of 2 to 7 bits in as many bits.

    MatMulIntegerToFloat(x, @w:i8)   →   MatMulIntegerToFloat(x, Cast(@w/stored:i4))

ONNX Runtime computes integer operators on constants once, when it loads the model, so a run
multiplies int8 as before. Codes, and multipliers of blocks and rows, are found from the values
(``quant.stored_codes``), without loss. 4 bits are INT4; other widths are planes of 4, 2 and 1 bits
in one UINT4 tensor. Refuses below opset 21, which has no such types, and weights that a subgraph
reads. Leaves weights of which no decision of the plan asks for few bits, those that need 8, and
those that would save little, of which the reason in the plan then says so.
Source: onnx.proto INT4 and UINT4; ONNX Runtime constant_folding.cc.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import Constant, Graph, Refusal, Tensor, array, rank
from qcompile.planning import Context
from qcompile.quant import LEAST_SAVED, Array, StoredCodes, nibbles, repeated_rows, stored_codes
from qcompile.quant.packing import NIBBLE, plane_spans
from qcompile.rewriting import Numerics, Pass, Stage

_SINCE = 21  # opset of INT4 and UINT4
_INT4, _UINT4 = (
    onnx.helper.tensor_dtype_to_np_dtype(kind)
    for kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
)
_INT8, _UINT8 = int(onnx.TensorProto.INT8), int(onnx.TensorProto.UINT8)


@dataclass(frozen=True)
class StoreFewBits(Pass):
    """Store weights of few bits packed; they are unpacked when the model is loaded."""

    name: ClassVar[str] = "store-few-bits"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq", "dequantize-at-load")

    def run(self, graph: Graph, ctx: Context) -> bool:
        if not any(d.spec is not None and d.spec.width for d in ctx.plan.decisions):
            return False
        changed = graph.merge_weights(transposed=True)  # codes in another order are other bytes
        unpacking = _Unpacking(graph, ctx)
        for constant in graph.constants().values():
            if constant.dtype != np.int8 or (rank(constant) or 0) < 2:
                continue
            form = _smallest(array(constant))
            saved = 0 if form is None else math.prod(constant.shape) - form.nbytes
            if form is None or saved < LEAST_SAVED:
                _say_why_bytes(ctx, constant, saved)
                continue
            obstacle = _obstacle(graph, constant)
            if obstacle is not None:
                ctx.skip((graph.consumers(constant) or [constant.name])[0], obstacle.reason)
                continue
            slots = graph.slots(constant)
            unpacked = unpacking.weight(constant, form)
            for node, slot in slots:
                graph.set_input(node, slot, unpacked)
            changed = True
        return changed


@dataclass(frozen=True)
class _Form:
    """A constant as codes. ``axis``: of its blocks, in a matrix of the given shape.

    ``repeated``: rows that its last rows repeat, which are not stored, int64 (n,); columns where
    ``along`` is -1.
    """

    codes: StoredCodes
    axis: int
    shape: tuple[int, int]
    repeated: Array
    along: int = 0

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.repeated.nbytes

    def laid_out(self, values: Array) -> Array:
        """What ``StoredCodes`` has as (inputs, outputs), in the order of the constant."""
        return values if self.axis == 0 else values.T


def _smallest(values: Array) -> _Form | None:
    """Blocks of a weight are along its first axis, those of a table or kernel along its last."""
    forms = list(_forms(values, np.zeros(0, np.int64)))
    for along in (0, -1):
        slices = np.moveaxis(values, along, 0)
        repeated = repeated_rows(slices)
        if len(repeated):
            kept = np.moveaxis(slices[: -len(repeated)], 0, along)
            forms += _forms(kept, repeated, along)
    return min(forms, key=lambda form: form.nbytes, default=None)


def _forms(values: Array, repeated: Array, along: int = 0) -> Iterator[_Form]:
    by_column, by_row = values.reshape(-1, values.shape[-1]), values.reshape(len(values), -1)
    for matrix, axis in ((by_column, 0), (by_row, 1)):
        codes = stored_codes(matrix if axis == 0 else matrix.T)
        if codes is not None:
            yield _Form(codes, axis, (matrix.shape[0], matrix.shape[1]), repeated, along)


def _say_why_bytes(ctx: Context, constant: Constant, saved: int) -> None:
    """Correct the plan's reason where it says that few bits are in the file."""
    tensor, _ = ctx.origins.get(constant.name, (constant.name, None))
    for decision in [d for d in ctx.plan.quantized("weight") if d.tensor == tensor]:
        bits = None if decision.spec is None else decision.spec.width
        if bits is not None:
            why = f"packing {bits} bits would save {saved:,} bytes, under {LEAST_SAVED:,}"
            ctx.plan.replace(decision, reason=f"8 bits in the file: {why}")


def _obstacle(graph: Graph, constant: Constant) -> Refusal | None:
    if graph.opset < _SINCE:
        return Refusal(
            f"{constant.name!r} could be stored in few bits, but opset {graph.opset} has no types "
            f"of 4 bits: they need opset {_SINCE}"
        )
    if graph.is_output(constant):
        return Refusal(f"{constant.name!r} could be stored in few bits, but a subgraph reads it")
    return None


def _stored_shape(constant: Constant, form: _Form) -> tuple[int, ...]:
    """The constant's shape without the rows or columns that are repeated."""
    shape: list[int] = list(constant.shape)
    shape[form.along] -= len(form.repeated)
    return tuple(shape)


@dataclass
class _Unpacking:
    """Adds the nodes that compute weights from what is stored, and shares their small constants."""

    graph: Graph
    ctx: Context
    small: dict[tuple[str, tuple[int, ...], bytes], Constant] = field(default_factory=dict)

    def weight(self, constant: Constant, form: _Form) -> Tensor:
        """The values of an int8 constant, computed from its codes."""
        name, codes = constant.name, form.codes
        tensor = self._centred(constant, form)
        if codes.multipliers is not None and codes.block is not None:
            tensor = self._reshaped(tensor, form.shape)
            factors = self._by_input(f"{name}/multipliers", constant, form)
            tensor = self._add("Mul", f"{name}/multiplied", tensor, factors)
        if codes.row_factors is not None:
            tensor = self._reshaped(tensor, form.shape)
            column = form.laid_out(codes.row_factors.astype(np.int8)[:, None])
            factors = self._stored(f"{name}/row-factors", column, constant)
            tensor = self._add("Mul", f"{name}/factored", tensor, factors)
        tensor = self._reshaped(tensor, _stored_shape(constant, form))
        if len(form.repeated):
            which, along = self._stored(f"{name}/repeated", form.repeated, constant), form.along
            again = self._add("Gather", f"{name}/again", tensor, which, axis=along)
            tensor = self._add("Concat", f"{name}/all", tensor, again, axis=along)
            tensor.shape = constant.shape
        tensor.dtype = np.dtype(np.int8)
        return tensor

    def _centred(self, constant: Constant, form: _Form) -> Tensor:
        """Codes as signed int8."""
        name, bits = constant.name, form.codes.bits
        codes, middle = form.laid_out(form.codes.codes), 1 << bits - 1
        noise = self.ctx.origins.get(name, (name, None))
        if bits == NIBBLE:
            signed = (codes.astype(np.int8) - np.int8(middle)).astype(_INT4)
            stored = self.graph.constant(
                f"{name}/int4", signed.reshape(_stored_shape(constant, form))
            )
            self.ctx.origins[stored.name] = noise
            return self._add("Cast", f"{name}/int8", stored, to=_INT8, shape=stored.shape)
        planes = nibbles(codes, bits).astype(_UINT4)
        stored = self.graph.constant(f"{name}/uint4", planes.reshape(1, -1))
        self.ctx.origins[stored.name] = noise
        whole = self._add("Cast", f"{name}/nibbles", stored, to=_UINT8)
        joined = self._joined(name, whole, bits, codes.size)
        signed = self._add("Cast", f"{name}/int8", joined, to=_INT8)
        offset = self._small(np.array(middle, np.int8))
        return self._add("Sub", f"{name}/centred", signed, offset, shape=(1, codes.size))

    def _joined(self, name: str, whole: Tensor, bits: int, count: int) -> Tensor:
        """The unsigned codes, uint8 (1, count), from all nibbles."""
        total: Tensor | None = None
        for width, shift, start, stop in plane_spans(bits, count):
            part = self._slice(f"{name}/plane", whole, start, stop)
            plane = self._apart(name, part, width, count)
            if shift:
                plane = self._shift(f"{name}/high", plane, shift, "LEFT")
            total = (
                plane if total is None else self._add("BitwiseOr", f"{name}/joined", total, plane)
            )
        assert total is not None  # every width has planes
        return total

    def _apart(self, name: str, part: Tensor, width: int, count: int) -> Tensor:
        """The values of a plane, (1, count), of which a nibble holds several."""
        if width == NIBBLE:
            return part
        mask, pieces = self._small(np.array(2**width - 1, np.uint8)), []
        for shift in range(0, NIBBLE, width):
            low = self._shift(f"{name}/shifted", part, shift, "RIGHT") if shift else part
            pieces.append(self._add("BitwiseAnd", f"{name}/masked", low, mask))
        plane = self._add("Concat", f"{name}/pieces", *pieces, axis=1)
        if count % len(pieces):
            plane = self._slice(f"{name}/values", plane, 0, count)
        return plane

    def _by_input(self, name: str, constant: Constant, form: _Form) -> Tensor:
        """A multiplier for each value, from one for each block."""
        multipliers, block = form.codes.multipliers, form.codes.block
        assert multipliers is not None and block is not None  # the caller asks
        axis, small = form.axis, form.codes.multiplier_bits == NIBBLE
        spread = np.expand_dims(form.laid_out(multipliers), axis + 1)
        kind = _INT4 if small else np.int8
        tensor: Tensor = self._stored(name, spread.astype(kind), constant)
        if small:
            tensor = self._add("Cast", f"{name}/int8", tensor, to=_INT8)
        if len(multipliers) == 1 or block == 1:
            return self._reshaped(tensor, spread.shape[:axis] + spread.shape[axis + 1 :])
        full = list(spread.shape)
        full[axis + 1] = block
        tensor = self._add("Expand", f"{name}/spread", tensor, self._integers(full))
        joined = [form.shape[0], form.shape[1]]
        joined[axis] = len(multipliers) * block
        tensor = self._add("Reshape", f"{name}/joined", tensor, self._integers(joined))
        if joined[axis] > form.shape[axis]:
            tensor = self._slice(f"{name}/by-input", tensor, 0, form.shape[axis], axis)
        return tensor

    def _stored(self, name: str, values: Array, constant: Constant) -> Constant:
        stored = self.graph.constant(name, values)
        origin, _ = self.ctx.origins.get(constant.name, (constant.name, None))
        self.ctx.origins[stored.name] = (origin, None)
        return stored

    def _slice(self, name: str, tensor: Tensor, start: int, stop: int, axis: int = 1) -> Tensor:
        ends = (self._integers([i]) for i in (start, stop, axis))
        return self._add("Slice", name, tensor, *ends)

    def _shift(self, name: str, tensor: Tensor, bits: int, direction: str) -> Tensor:
        amount = self._small(np.array(bits, np.uint8))
        return self._add("BitShift", name, tensor, amount, direction=direction)

    def _reshaped(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tensor.shape is not None and tuple(tensor.shape) == shape:
            return tensor
        integers = self._integers(list(shape))
        return self._add("Reshape", f"{tensor.name}/shaped", tensor, integers, shape=shape)

    def _add(
        self,
        op: str,
        name: str,
        *inputs: Tensor,
        shape: tuple[int, ...] | None = None,
        **attrs: int | str,
    ) -> Tensor:
        result: Tensor = self.graph.add(op, inputs, [name], attrs).outputs[0]
        result.shape = shape
        return result

    def _integers(self, values: list[int]) -> Constant:
        return self._small(np.array(values, np.int64))

    def _small(self, values: Array) -> Constant:
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self.small:
            text = "x".join(map(str, values.reshape(-1).tolist()))
            self.small[key] = self.graph.constant(f"unpack/{text}", values)
        return self.small[key]
