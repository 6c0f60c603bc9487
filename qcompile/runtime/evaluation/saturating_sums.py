"""Builds ONNX nodes that saturate sums of products as x86 without VNNI does.

That adds neighbouring products a[2i] w[2i] + a[2i+1] w[2i+1] of uint8 by int8 in int16 (MLAS,
QgemmU8S8KernelAvx2: vpmaddubsw) and everything else in int32. So a saturated sum is the exact one
plus clip(p) - p for each pair, with p the pair's sum. |p| is at most 2^16 and a product at most
2^15, so both are exact in float32, for which all operators exist since opset 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_graph, make_node, make_tensor_value_info
from onnx.numpy_helper import from_array

from qcompile.quant import Array
from qcompile.quant.weight_rounding import pairs as neighbours
from qcompile.runtime.evaluation.int16_saturation import HIGH, LOW, can_leave

CHUNK = 1 << 12  # pairs at a time: their int32 sums are 16 KB for each row of data
_BLOCK = 1 << 10  # columns of a weight checked together
_SUM = TensorProto.INT32
_END = int(np.iinfo(np.int64).max)  # the end of a shape of any length


@dataclass
class Fragment:
    """Nodes and constants to insert into a graph, with names that are not ``taken`` in it.

    ``stem``: prefix of all names.
    """

    stem: str
    taken: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def name(self, what: str) -> str:
        """Reserve a free name."""
        number, name = 0, f"{self.stem}/{what}"
        while name in self.taken:
            number += 1
            name = f"{self.stem}/{what}_{number}"
        self.taken.add(name)
        return name

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node; returns the name of its output."""
        return self.add_all(op, inputs, 1, domain=domain, **attributes)[0]

    def add_all(
        self, op: str, inputs: tuple[str, ...], outputs: int, **attributes: Any
    ) -> list[str]:
        """Append a node of several outputs; returns their names."""
        node, made = self.name(op), [self.name(f"{op}:{i}") for i in range(outputs)]
        self.nodes.append(make_node(op, list(inputs), made, name=node, **attributes))
        return made

    def cast(self, tensor: str, kind: int) -> str:
        return self.add("Cast", tensor, to=kind)

    def constant(self, values: Array) -> str:
        """Add an initializer; returns its name."""
        name = self.name("constant")
        self.constants.append(from_array(np.ascontiguousarray(values), name))
        return name

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def sizes(self, shape: str, start: int, stop: int) -> str:
        """Part of an int64 vector, such as a shape."""
        return self.add("Slice", shape, self.integers(start), self.integers(stop))

    def end(self, output: str) -> None:
        """Give the last node's output the name that the graph knows it by."""
        self.nodes[-1].output[0] = output


@dataclass(frozen=True)
class Pairs:
    """Pairs of products that can leave int16, in order of the sums that they belong to.

    rows: int64 [pairs, 2], of the data. weights: int8 [pairs, 2]. columns: int64 [pairs], the sum.
    """

    rows: Array
    weights: Array
    columns: Array

    def chunks(self) -> Iterator[Pairs]:
        """Few enough to hold what they make."""
        for start in range(0, len(self.columns), CHUNK):
            part = slice(start, start + CHUNK)
            yield Pairs(self.rows[part], self.weights[part], self.columns[part])


def saturable(weight: Array) -> Pairs:
    """Pairs of an int8 weight [inputs, outputs] that can exceed int16 for some uint8 data.

    An odd last row has no partner, and fits.
    """
    first, second = neighbours(weight)
    places, columns = [], []
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        column, place = np.nonzero(can_leave(first[:, block], second[:, block]).T)
        places.append(place)
        columns.append(column + start)
    at = np.concatenate(places) if places else np.zeros(0, np.int64)
    to = np.concatenate(columns) if columns else np.zeros(0, np.int64)
    rows = np.stack([2 * at, 2 * at + 1], axis=1)
    return Pairs(rows, weight[rows, to[:, None]], to)


def excess(f: Fragment, data: str, pairs: Pairs, outputs: int) -> str:
    """Saturated minus exact sums: int32 [outputs, rows], for uint8 data [inputs, rows]."""
    parts = [_excess(f, data, chunk, outputs) for chunk in pairs.chunks()]
    total = parts[0]
    for part in parts[1:]:
        total = f.add("Add", total, part)
    return total


def _excess(f: Fragment, data: str, pairs: Pairs, outputs: int) -> str:
    """Cumulative sums over the pairs, so that the sum over a column is a difference of two.

    int32 wraps around, so differences are exact. A first pair with weights 0 gives the sum of no
    pairs.
    """
    rows = np.pad(pairs.rows, ((1, 0), (0, 0))).astype(np.int32)
    weights = np.pad(pairs.weights, ((1, 0), (0, 0))).astype(np.float32)
    terms = []
    for i in (0, 1):
        taken = f.cast(f.add("Gather", data, f.constant(rows[:, i]), axis=0), TensorProto.FLOAT)
        terms.append(f.add("Mul", taken, f.constant(weights[:, i : i + 1])))
    over = _over(f, f.add("Add", *terms))
    running = f.add("CumSum", over, f.constant(np.array(0, np.int64)))
    ends = np.searchsorted(pairs.columns, np.arange(outputs), side="right")
    starts = np.pad(ends[:-1], (1, 0))
    bounds = (f.add("Gather", running, f.constant(at), axis=0) for at in (ends, starts))
    return f.add("Sub", *bounds)


def _over(f: Fragment, sums: str) -> str:
    """clip(p) - p for float32 sums p of pairs, as int32."""
    low, high = (f.constant(np.array(limit, np.float32)) for limit in (LOW, HIGH))
    return f.cast(f.add("Sub", f.add("Clip", sums, low, high), sums), _SUM)


def every_pair(f: Fragment, exact: str, left: str, right: str) -> str:
    """The saturated matrix multiplication of two operands, pair by pair.

    ``exact``: int32 [..., rows, outputs], the exact result. ``left`` [..., rows, inputs] and
    ``right`` [..., inputs, outputs]: one uint8, the other int8. Their leading dimensions broadcast;
    inputs may be odd. A Loop, since a Scan needs known ranks.
    """
    shape = f.add("Shape", left)
    inputs = f.sizes(shape, -1, _END)
    odd = f.add("Mod", inputs, f.integers(2))
    half = f.add("Div", f.add("Add", inputs, odd), f.integers(2))
    operands = _in_pairs(f, left, odd, half, 0), _in_pairs(f, right, odd, half, 1)
    count = f.add("Gather", half, f.constant(np.array(0, np.int64)), axis=0)
    return f.add("Loop", count, "", exact, body=_step(f, *operands))


def _in_pairs(f: Fragment, operand: str, odd: str, half: str, rest: int) -> str:
    """[..., inputs, *rest] as float32 [..., pairs, 2, *rest], a zero after an odd number of inputs.

    ``odd`` and ``half``: int64 [1], number of inputs without a partner, and of pairs. ``rest``: 0
    or 1 dimensions.
    """
    shape = f.add("Shape", operand)
    lead, tail = f.sizes(shape, 0, -1 - rest), f.sizes(shape, -rest or _END, _END)
    gap = f.add("ConstantOfShape", f.add("Concat", lead, odd, tail, axis=0))
    even = f.add("Concat", f.cast(operand, TensorProto.FLOAT), gap, axis=-1 - rest)
    return f.add("Reshape", even, f.add("Concat", lead, half, f.integers(2), tail, axis=0))


def _step(f: Fragment, left: str, right: str) -> onnx.GraphProto:
    """Loop body for one pair: adds clip(p) - p.

    ``left``: [..., rows, pairs, 2], ``right``: [..., pairs, 2, outputs].
    """
    body = Fragment(f.stem, f.taken)
    place, go, before = (body.name(what) for what in ("place", "go", "sums"))
    first = body.add("Gather", left, place, axis=-2)
    second = body.add("Gather", right, place, axis=-3)
    pair = body.add("MatMul", first, second)
    after = body.add("Add", before, _over(body, pair))
    on = body.add("Identity", go)
    given = [
        make_tensor_value_info(place, TensorProto.INT64, []),
        make_tensor_value_info(go, TensorProto.BOOL, []),
        make_tensor_value_info(before, _SUM, None),
    ]
    made = [
        make_tensor_value_info(on, TensorProto.BOOL, []),
        make_tensor_value_info(after, _SUM, None),
    ]
    return make_graph(body.nodes, f.name("pair"), given, made, body.constants)
