"""What ONNX Runtime computes from packed weights when it loads a model: nothing is left for a run.

The file holds few bits and a run multiplies int8, so the optimized graph must consist of the
matrix multiplication alone.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from qcompile.quant import Array
from qcompile.quant.packing import halves, packed, planes
from qcompile.quant.rounding.block_multipliers import with_multipliers
from qcompile.quant.rounding.lattice import fitted
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.session import Session, optimized_ops

OUTPUTS = 5
TYPES = {2: onnx.TensorProto.UINT2, 4: onnx.TensorProto.UINT4}
# ONNX has 2-bit types from opset 25, and 4-bit types from opset 21 on.
OPSETS = {2: 25, 4: 21}


def stored(name: str, values: Array, bits: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TYPES[bits], values.shape, packed(values, bits), raw=True)


def check(
    nodes: str, weight: Array, opset: int, few_bits: list[onnx.TensorProto], **constants: Array
) -> None:
    """``nodes`` compute w, int8, from constants: exactly ``weight``, and not in a run."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g (uint8[n, {len(weight)}] x) => (float[n, {OUTPUTS}] y) {{
        {nodes}
        y = com.microsoft.MatMulIntegerToFloat(x, w, one, ones, zero)
    }}"""
    ones = np.ones(OUTPUTS, np.float32)
    zero = np.array(0, np.uint8)
    model = model_proto(text, opset, one=np.array(1, np.float32), ones=ones, zero=zero, **constants)
    model.graph.initializer.extend(few_bits)
    model.ir_version = 13 if opset == OPSETS[2] else 10
    data = model.SerializeToString()
    found = Session(data).run({"x": np.eye(len(weight), dtype=np.uint8)})["y"]
    assert np.array_equal(found, weight)
    assert dict(optimized_ops(data)) == {"com.microsoft.MatMulIntegerToFloat": 1}


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_with_a_zero_per_output(bits: int) -> None:
    lattice = fitted(normal(9, OUTPUTS), bits, zero="integer")
    codes = lattice.nearest(normal(9, OUTPUTS))
    zero = lattice.zero.astype(np.uint8)
    check(
        "a = Cast<to = 3>(q)  b = Cast<to = 3>(z)  w = Sub(a, b)",
        codes.astype(np.int8) - zero.astype(np.int8),
        OPSETS[bits],
        [stored("q", codes, bits), stored("z", zero, bits)],
    )


def test_six_bits_are_planes_of_four_and_two() -> None:
    codes = fitted(normal(9, OUTPUTS), 6).nearest(normal(9, OUTPUTS))
    high, low = planes(codes, 6)
    check(
        """h = Cast<to = 3>(q4)  l = Cast<to = 3>(q2)
           scaled = Mul(h, four)  sum = Add(scaled, l)  w = Sub(sum, middle)""",
        codes.astype(np.int8) - 32,
        OPSETS[2],
        [stored("q4", high.values, 4), stored("q2", low.values, 2)],
        four=np.array(4, np.int8),
        middle=np.array(32, np.int8),
    )


@pytest.mark.parametrize("rows", [8, 9])
def test_three_bits_are_a_plane_of_two_and_halves(rows: int) -> None:
    codes = fitted(normal(rows, OUTPUTS), 3).nearest(normal(rows, OUTPUTS))
    high, low = planes(codes, 3)
    check(
        """h = Cast<to = 3>(q2)  j = Cast<to = 3>(q1)
           second = Div(j, two)  twice = Mul(second, two)  first = Sub(j, twice)
           both = Concat<axis = 0>(first, second)  l = Slice(both, from, rows, axes)
           scaled = Mul(h, two)  sum = Add(scaled, l)  w = Sub(sum, middle)""",
        codes.astype(np.int8) - 4,
        OPSETS[2],
        [stored("q2", high.values, 2), stored("q1", halves(low.values), 2)],
        two=np.array(2, np.int8),
        middle=np.array(4, np.int8),
        **{"from": np.array([0]), "rows": np.array([rows]), "axes": np.array([0])},
    )


@pytest.mark.parametrize("rows", [12, 14])
def test_block_multipliers_with_a_shorter_last_block(rows: int) -> None:
    w = normal(rows, OUTPUTS)
    found = with_multipliers(w, fitted(w, 4, block=4), most=7)
    codes = found.lattice.nearest(w)
    check(
        """a = Cast<to = 3>(q)  centred = Sub(a, middle)
           times = Gather<axis = 0>(m, block)  w = Mul(centred, times)""",
        found.integers(codes),
        OPSETS[4],
        [stored("q", codes, 4)],
        m=found.multipliers,
        middle=np.array(8, np.int8),
        block=np.arange(rows) // 4,
    )


def test_what_depends_on_the_data_is_left() -> None:
    """The check sees operators that are not folded."""
    with pytest.raises(AssertionError):
        check(
            """a = Cast<to = 3>(q)
               least = ReduceMin<keepdims = 0>(x)  c = Cast<to = 3>(least)  w = Add(a, c)""",
            np.zeros((9, OUTPUTS), np.int8),
            OPSETS[4],
            [stored("q", np.zeros((9, OUTPUTS), np.uint8), 4)],
        )
