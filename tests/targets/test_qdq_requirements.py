"""Rules on Q/DQ nodes: each passes the form that TensorRT wants, and fails on one thing alone."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.targets.qdq_requirements import (
    DataScales,
    FloatBiases,
    Int4Weights,
    Integers,
    OperandTypes,
    Opsets,
    Pairs,
    PositiveScales,
    ScaleTypes,
    WeightScales,
    WholeOperands,
    ZeroPoints,
    ZeroPointSizes,
)
from qcompile.targets.requirements import Requirement, examine
from qcompile.targets.tensorrt import TENSORRT

F32 = np.float32
INT4 = ml_dtypes.int4
NONE = np.zeros(0)
QX = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
QW = "w = DequantizeLinear<axis = 1>(wq, ws, wz)"
GOOD = f"{QX} {QW} m = MatMul(d, w) y = Add(m, b)"


def graph(body: str, **changed: Array) -> Graph:
    values: dict[str, Array] = {
        "s": np.array(0.1, F32),
        "z": np.array(0, np.int8),
        "wq": np.arange(24, dtype=np.int8).reshape(4, 6),
        "ws": np.full(6, 0.1, F32),
        "wz": np.zeros(6, np.int8),
        "b": normal(6),
        "bq": np.arange(6, dtype=np.int32),
        "bs": np.full(6, 0.1, F32),
        "one": np.array([1, 1, 4]),
        **changed,
    }
    made, read = set(re.findall(r"(\w+) = \w", body)), set(re.findall(r"(\w+)[,)]", body))
    values = {n: v for n, v in values.items() if n in read - made}
    opset = 21 if "block_size" in body or values.get("wq", NONE).dtype == INT4 else 20
    opset = 23 if "output_dtype" in body or "precision" in body else opset
    return parse(f"g (float[N,4] x) => (float[N,6] y) {{ {body} }}", opset, **values)


def faults(requirement: Requirement, body: str, **changed: Array) -> list[str]:
    return [str(f) for f in examine(graph(body, **changed), (requirement,)).faults]


def test_the_form_that_tensorrt_wants_passes_every_rule() -> None:
    found = examine(graph(GOOD), TENSORRT.requires)
    assert found.faults == []
    assert found.checked == {
        "operators": 5, "integer-types": 3, "zero-points": 3, "data-scales": 3,
        "weight-scales": 1, "float-biases": 0, "whole-operands": 1, "pairs": 3,
        "zero-point-sizes": 3, "positive-scales": 3, "scale-types": 3, "operand-types": 5,
        "int4-weights": 0,
    }  # fmt: skip


def test_layout_operators_may_stand_between() -> None:
    body = f"{QX} t = Unsqueeze(d, k) u = Squeeze(t, k) {QW} m = MatMul(u, w) y = Add(m, b)"
    found = examine(graph(body, k=np.array([0])), TENSORRT.requires)
    assert found.faults == []


def test_transposed_gemm_has_its_channels_first() -> None:
    body = f"{QX} w = DequantizeLinear<axis = 0>(wq, ws, wz) y = Gemm<transB = 1>(d, w, b)"
    turned = {"wq": np.arange(24, dtype=np.int8).reshape(6, 4)}
    assert not examine(graph(body, **turned), TENSORRT.requires).faults


def test_integers() -> None:
    body = f"{QX.replace('z)', 'uz)')} {QW} m = MatMul(d, w) y = Add(m, b)"
    found = faults(Integers(("int8",)), body, uz=np.array(128, np.uint8))
    assert found == [
        "integer-types: node 'QuantizeLinear:q': QuantizeLinear of uint8, expected int8",
        "integer-types: node 'DequantizeLinear:d': DequantizeLinear of uint8, expected int8",
    ]


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn])
def test_floats_of_few_bits_are_no_integers(kind: type) -> None:
    zeros: dict[str, Array] = {
        "z": np.array(0, kind),
        "wz": np.zeros(6, kind),
        "wq": np.ones((4, 6), kind),
    }
    found = faults(Integers(("int8", "int4")), GOOD, **zeros)
    name = np.dtype(kind).name
    assert found == [
        f"integer-types: node '{node}': {node.split(':')[0]} of {name}, expected int8 or int4"
        for node in ("QuantizeLinear:q", "DequantizeLinear:d", "DequantizeLinear:w")
    ]


def test_zero_points() -> None:
    assert faults(ZeroPoints(), GOOD, z=np.array(3, np.int8)) == [
        "zero-points: node 'QuantizeLinear:q': zero point is 3, expected 0",
        "zero-points: node 'DequantizeLinear:d': zero point is 3, expected 0",
    ]
    assert "0, 1" in faults(ZeroPoints(), GOOD, wz=np.array([0, 0, 1, 0, 0, 0], np.int8))[0]
    body = f"z = Cast<to = 3>(x0) {GOOD}"
    assert "computed" in faults(ZeroPoints(), body, x0=np.array(0, F32))[0]


def test_data_scales() -> None:
    many = QX.replace("Linear(", "Linear<axis = 1>(").replace("s, z", "vs, vz")
    body = f"{many} {QW} m = MatMul(d, w) y = Add(m, b)"
    found = faults(DataScales(), body, vs=np.full(4, 0.1, F32), vz=np.zeros(4, np.int8))
    assert len(found) == 2 and "scale of shape [4], expected one scale" in found[0]
    body = f"s = Abs(s0) {GOOD}"
    assert "is computed" in faults(DataScales(), body, s0=np.array(0.1, F32))[0]


def test_weight_scales() -> None:
    one = GOOD.replace("wq, ws, wz", "wq, s, z")
    assert faults(WeightScales((("MatMul", -1),)), one) == [
        "weight-scales: node 'DequantizeLinear:w': scale of shape [] on axis 1, expected [6] on "
        "axis -1, the output channels of MatMul 'MatMul:m'"
    ]
    rows = GOOD.replace("axis = 1>(wq, ws, wz", "axis = 0>(wq, rs, rz")
    found = faults(
        WeightScales((("MatMul", -1),)), rows, rs=np.ones(4, F32), rz=np.zeros(4, np.int8)
    )
    assert len(found) == 1 and "scale of shape [4] on axis 0" in found[0]


def test_float_biases() -> None:
    body = f"{QX} {QW} c = DequantizeLinear<axis = 0>(bq, bs) y = Gemm(d, w, c)"
    found = faults(FloatBiases(), body)
    assert len(found) == 1
    assert "its bias is dequantized by 'DequantizeLinear:c', expected a float" in found[0]
    assert faults(Integers(("int8",)), body) != []


def test_whole_operands() -> None:
    rule = WholeOperands(("MatMul",))
    found = faults(rule, f"{QW} m = MatMul(x, w) y = Add(m, b)")
    assert found == [
        "whole-operands: node 'MatMul:m': MatMul has a float first operand, expected both "
        "quantized or none"
    ]
    found = faults(rule, f"{QX} m = MatMul(d, f) y = Add(m, b)", f=normal(4, 6))
    assert "a float second operand" in found[0]
    assert faults(rule, "m = MatMul(x, f) y = Add(m, b)", f=normal(4, 6)) == []


def test_pairs() -> None:
    rule = Pairs(("MatMul",))
    found = faults(rule, f"{QX} {QW} r = Relu(d) m = MatMul(r, w) y = Add(m, b)")
    assert found == ["pairs: node 'DequantizeLinear:d': Relu 'Relu:r' reads it, expected MatMul"]
    body = f"{QX} {QW} m = MatMul(d, w) i = Cast<to = 1>(q) o = MatMul(i, w) y = Add(m, o)"
    assert "Cast 'Cast:i' reads it, expected DequantizeLinear" in faults(rule, body)[0]
    body = f"q = Cast<to = 3>(x) d = DequantizeLinear(q, s, z) {QW} m = MatMul(d, w) y = Add(m, b)"
    assert "reads 'q', expected what QuantizeLinear makes" in faults(rule, body)[0]


@pytest.mark.parametrize(
    ("newest", "reason"),
    [
        ((("", 19),), "MatMul in opset 20 of ai.onnx, expected ai.onnx to 19"),
        ((("ai.onnx.ml", 3),), "MatMul is of domain 'ai.onnx', expected ai.onnx.ml to 3"),
    ],
)
def test_opsets(newest: tuple[tuple[str, int], ...], reason: str) -> None:
    found = faults(Opsets(newest), "m = MatMul(x, f) y = Add(m, b)", f=normal(4, 6))
    assert len(found) == 2 and reason in found[0]
    assert not faults(Opsets((("", 20),)), GOOD)


def test_foreign_operators_are_named() -> None:
    body = "m = MatMul(x, f) y = com.microsoft.BiasGelu(m, b)"
    found = faults(Opsets((("", 20),)), body, f=normal(4, 6))
    what = "BiasGelu is of domain 'com.microsoft', expected ai.onnx to 20"
    assert found == [f"operators: node 'BiasGelu:y': {what}"]


def test_zero_point_sizes() -> None:
    assert faults(ZeroPointSizes(), GOOD) == []
    assert faults(ZeroPointSizes(), GOOD, wz=np.array(0, np.int8)) == [
        "zero-point-sizes: node 'DequantizeLinear:w': zero point of shape [], expected [6], as the "
        "scale"
    ]


@pytest.mark.parametrize("scale", [0, -0.1, np.inf])
def test_positive_scales(scale: float) -> None:
    assert faults(PositiveScales(), GOOD) == []
    found = faults(PositiveScales(), GOOD, ws=np.array([0.1] * 5 + [scale], F32))
    assert len(found) == 1 and "expected positive numbers" in found[0]


HALF = np.float16
IN_HALF = (
    "h = Cast<to = 10>(x) q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) "
    f"{QW} m = MatMul(d, w) a = Add(m, b) y = Cast<to = 1>(a)"
)
IN_FLOAT16 = {"s": np.array(0.1, HALF), "ws": np.full(6, 0.1, HALF), "b": normal(6).astype(HALF)}


def test_float16_between_the_quantizers_passes_every_rule() -> None:
    assert examine(graph(IN_HALF, **IN_FLOAT16), TENSORRT.requires).faults == []


def test_a_scale_that_is_0_in_float16_is_not_positive() -> None:
    small = IN_FLOAT16 | {"ws": np.array([0.1] * 5 + [1e-9], HALF)}
    found = faults(PositiveScales(), IN_HALF, **small)
    assert len(found) == 1 and "'ws' holds 0 to 0.09" in found[0]


def test_scale_types() -> None:
    wrong = IN_FLOAT16 | {"s": np.array(0.1, F32)}
    found = faults(ScaleTypes(), IN_HALF, **wrong)
    what = "scale of float32, expected float16 as 'h'"
    assert found[0] == f"scale-types: node 'QuantizeLinear:q': {what}"
    typed = IN_HALF.replace("axis = 1>", "axis = 1, output_dtype = 10>")
    found = faults(ScaleTypes(), typed, **IN_FLOAT16)
    assert found == ["scale-types: node 'DequantizeLinear:w': output_dtype is 10, expected none"]


@pytest.mark.parametrize(("precision", "count"), [(10, 0), (1, 1)])
def test_the_precision_of_a_division_is_that_of_the_scale(precision: int, count: int) -> None:
    asked = f"QuantizeLinear<precision = {precision}>(h"
    found = faults(ScaleTypes(), IN_HALF.replace("QuantizeLinear(h", asked), **IN_FLOAT16)
    what = "precision is 1, expected none, or the type of the scale"
    assert found == [f"scale-types: node 'QuantizeLinear:q': {what}"] * count


def test_operand_types() -> None:
    wrong = IN_FLOAT16 | {"b": normal(6)}
    assert faults(OperandTypes(), IN_HALF, **wrong) == [
        "operand-types: node 'Add:a': Add: 'b' is float32, expected float16 as 'm'"
    ]


ALONE = "w = DequantizeLinear<axis = 0, block_size = 2>(wq, ws, wz) m = MatMul(x, w) y = Add(m, b)"


def blocks(rows: int, columns: int = 6) -> dict[str, Array]:
    return {
        "wq": np.ones((4, columns), INT4),
        "ws": np.full((rows, columns), 0.1, F32),
        "wz": np.zeros((rows, columns), INT4),
    }


def test_weights_of_four_bits_are_alone() -> None:
    assert examine(graph(ALONE, **blocks(2)), TENSORRT.requires).faults == []
    by_channel = {"wq": np.ones((4, 6), INT4), "wz": np.zeros(6, INT4)}
    body = f"{QW} m = MatMul(x, w) y = Add(m, b)"
    assert examine(graph(body, **by_channel), TENSORRT.requires).faults == []


def test_int4_weights() -> None:
    odd = {"wq": np.ones((3, 5), INT4), "ws": np.full(5, 0.1, F32), "wz": np.zeros(5, INT4)}
    body = f"{QW} m = MatMul(x, w) y = Add(m, b)"
    found = faults(Int4Weights(), body, **odd, b=normal(5))
    assert "INT4 weight of shape [3, 5], expected an even number of values" in found[0]
    even = {**odd, "wq": np.ones((4, 5), INT4)}
    assert not faults(Int4Weights(), body, **even, b=normal(5))
    data = {"s": np.array(0.1, F32), "z": np.array(0, INT4)}
    found = faults(Int4Weights(), f"{QX} y = MatMul(d, f)", **data, f=normal(4, 6))
    assert len(found) == 2 and "INT4 data, expected a constant weight" in found[0]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        pytest.param((3, 6), 2, id="unequal blocks"),
        pytest.param((2, 6), 3, id="a smaller last block, where the parser finds blocks of 2"),
        pytest.param((4, 6), 1, id="no blocked axis"),
        pytest.param((2, 3), 2, id="two blocked axes"),
        pytest.param((1, 4, 6), 2, id="another rank"),
    ],
)
def test_blocks_of_int4(shape: tuple[int, ...], size: int) -> None:
    body = ALONE.replace("block_size = 2", f"block_size = {size}")
    scales = {"ws": np.full(shape, 0.1, F32), "wz": np.zeros(shape, INT4)}
    found = faults(Int4Weights(), body, wq=np.ones((4, 6), INT4), **scales)
    what = f"scales of shape {list(shape)} for a weight of shape [4, 6], expected equal blocks"
    assert len(found) == 1 and what in found[0]
