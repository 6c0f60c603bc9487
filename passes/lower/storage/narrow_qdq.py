"""Stores weights of few bits as INT4 or INT2, in front of their DequantizeLinear.

    DequantizeLinear(@w : int8, s)  →  DequantizeLinear(@w : int4, s)
                                    →  DequantizeLinear<axis, block_size>(@w : int4, s · m)

An int8 weight of few bits consists of codes, or of codes times an integer m for each block of
inputs; m becomes part of the block's scale. INT2 holds codes from -2 to 1, INT4 those from -8 to 7.
Scales are positive: where m is not, codes are negated, and those that then reach from -7 to 8 or
from -1 to 2 become UINT4 or UINT2 with a zero point of 7 or 1.
Refuses codes of more bits, factors by row, blocks of a kernel, and opsets without the type: such a
weight stays int8. Rounding: without blocks all values stay the same; with them float32 rounds
``code · (m · s)`` and ``(code · m) · s`` differently, by up to three halves of a unit in the last
place (none where s has at most 17 significant bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from qcompile.ir import Graph, Node, Refusal, array, is_constant, is_op
from qcompile.planning import Context
from qcompile.quant import Array, Floats, stored_codes
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.target import INT2_SINCE, INT4_SINCE

NOTE = "low-bit-qdq"
_SIGNED = {2: onnx.TensorProto.INT2, 4: onnx.TensorProto.INT4}
_UNSIGNED = {2: onnx.TensorProto.UINT2, 4: onnx.TensorProto.UINT4}
_SCALE_BYTES = 4


@dataclass(frozen=True)
class _Codes:
    """A weight as codes, int8 (inputs, outputs), times multipliers, (blocks, outputs), of a block.

    multipliers: float32, or None for ones.
    """

    codes: Array
    multipliers: Floats | None = None
    block: int = 0

    @property
    def bits(self) -> int | None:
        """Width of the smallest type that holds the codes, None where that is int8."""
        low, high = int(self.codes.min()), int(self.codes.max())
        return next((b for b in _SIGNED if -(1 << b - 1) <= low and high < 1 << b - 1), None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and multipliers in the file."""
        scales = 0 if self.multipliers is None else self.multipliers.size * _SCALE_BYTES
        return self.codes.size * (self.bits or 8) // 8 + scales


@dataclass(frozen=True)
class NarrowQdq(Pass):
    """Store weights of 2 to 4 bits as INT4 or INT2."""

    name: ClassVar[str] = "narrow-qdq"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("fit-biases",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        count = 0
        for node in [n for n in graph.nodes if _has_few_bits(n, ctx)]:
            narrow = _narrow(node, graph.opset)
            if isinstance(narrow, Refusal):
                ctx.skip(node, f"{narrow.reason}: stays int8")
                continue
            bits = _stored_bits(narrow, graph.opset)
            if bits != narrow.bits:
                found = f"the model stays at {graph.opset}"
                ctx.skip(node, f"INT2 needs opset {INT2_SINCE}, {found}: stored as INT4")
            _store(graph, ctx, node, narrow, bits)
            count += 1
        if count:
            ctx.remarks[NOTE] = (
                f"weights behind DequantizeLinear have 4 or 2 bits ({count} here), for portability "
                "and studies of accuracy, not for speed: ONNX Runtime's CPU provider cannot "
                "multiply them by data that the graph quantizes, and computes with float data "
                "(--target cpu computes with 8 bits)"
            )
        return count > 0


def _has_few_bits(node: Node, ctx: Context) -> bool:
    """True for the dequantizer of an int8 weight that was planned to have codes of few bits."""
    if not is_op(node, "DequantizeLinear") or not all(map(is_constant, node.inputs)):
        return False
    origin, _ = _origin(ctx, node)
    specs = [d.spec for d in ctx.plan.quantized("weight") if d.tensor == origin]
    few = any(spec is not None and spec.width is not None for spec in specs)
    return few and node.inputs[0].dtype == np.int8


def _origin(ctx: Context, node: Node) -> tuple[str, float | None]:
    """The tensor of the input model that a dequantizer's weight was, and its SQNR."""
    name = node.inputs[0].name
    return ctx.origins.get(name, (name, None))


def _narrow(node: Node, opset: int) -> _Codes | Refusal:
    """The weight of a dequantizer as codes that ONNX has a type for."""
    if opset < INT4_SINCE:
        return Refusal(f"INT4 needs opset {INT4_SINCE}, the model stays at {opset}")
    values = array(node.inputs[0])
    matrix = _inputs_first(values, node.attrs["axis"])
    forms = [form for form in (_Codes(matrix), _with_multipliers(matrix)) if form is not None]
    fitting = [form for form in forms if form.bits is not None]
    if not fitting:
        low, high = forms[-1].codes.min(), forms[-1].codes.max()
        return Refusal(f"codes from {low} to {high} do not fit into INT4")
    best = min(fitting, key=lambda form: form.nbytes)
    if 0 < best.block < len(matrix) and values.ndim != 2:
        return Refusal(f"DequantizeLinear has no blocks over several axes, {list(values.shape)}")
    return best


def _with_multipliers(matrix: Array) -> _Codes | None:
    """Codes with a multiplier by block. Factors by row, if any, stay in the codes."""
    stored = stored_codes(matrix)
    if stored is None or stored.multipliers is None or stored.block is None:
        return None
    multipliers = np.where(stored.multipliers == 0, 1, stored.multipliers).astype(np.int16)
    codes = matrix // _by_input(multipliers, stored.block, len(matrix))
    return _Codes(codes.astype(np.int8), multipliers.astype(np.float32), stored.block)


def _stored_bits(narrow: _Codes, opset: int) -> int:
    """Width of the type in the file: INT2 came after INT4."""
    return 2 if narrow.bits == 2 and opset >= INT2_SINCE else 4


def _store(graph: Graph, ctx: Context, node: Node, narrow: _Codes, bits: int) -> None:
    """Let a dequantizer read codes of ``bits``, and the scales of their blocks."""
    weight, scale = node.inputs[:2]
    axis, shape, block = node.attrs["axis"], tuple(weight.shape), narrow.block
    steps = array(scale)
    values, zeros = narrow.codes, np.zeros(steps.shape, _numpy_type(_SIGNED[bits]))
    if narrow.multipliers is not None:
        values, zeros = _turned(narrow, bits)
        steps = np.abs(narrow.multipliers) * steps
        if block < len(values):
            node.attrs["axis"], node.attrs["block_size"] = 1 - axis, block
        else:
            steps, zeros = steps[0], zeros[0]
        if axis == 0:
            steps, zeros = np.ascontiguousarray(steps.T), np.ascontiguousarray(zeros.T)
    origin = _origin(ctx, node)
    base, name = origin[0], zeros.dtype.name
    codes = graph.constant(f"{base}/{name}", _restored(values, shape, axis).astype(zeros.dtype))
    if narrow.multipliers is not None:
        scale = graph.constant(f"{base}/block_scale", steps)
    zero = graph.constant(f"{base}/{name}_zero_point", zeros)
    ctx.origins[codes.name] = origin
    ctx.origins[scale.name] = ctx.origins[zero.name] = (base, None)
    node.inputs.clear()
    node.inputs.extend([codes, scale, zero])


def _turned(narrow: _Codes, bits: int) -> tuple[Array, Array]:
    """Codes for the absolute values of the multipliers, and zero points (blocks, outputs).

    Zero points have the type of ``bits`` that holds the codes.
    """
    assert narrow.multipliers is not None
    down = narrow.multipliers < 0
    signs = np.where(down, -1, 1).astype(np.int16)
    codes = narrow.codes * _by_input(signs, narrow.block, len(narrow.codes))
    half = 1 << bits - 1
    if codes.max() < half and codes.min() >= -half:
        return codes, np.zeros(down.shape, _numpy_type(_SIGNED[bits]))
    zeros = half - down.astype(np.int16)
    codes += _by_input(zeros, narrow.block, len(codes))
    return codes, zeros.astype(_numpy_type(_UNSIGNED[bits]))


def _numpy_type(kind: int) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    return found


def _by_input(per_block: Array, block: int, inputs: int) -> Array:
    """One row for each input, of (blocks, outputs)."""
    rows: Array = np.repeat(per_block, block, axis=0)[:inputs]
    return rows


def _inputs_first(values: Array, axis: int) -> Array:
    """A weight with scales on ``axis`` as (inputs, outputs)."""
    matrix: Array = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    return matrix


def _restored(matrix: Array, shape: tuple[int, ...], axis: int) -> Array:
    """What ``_inputs_first`` made a matrix of, in its shape."""
    moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    return np.moveaxis(matrix.reshape(moved), -1, axis)
