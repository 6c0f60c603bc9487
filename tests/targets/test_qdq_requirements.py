"""Rules on Q/DQ nodes: each passes the form that TensorRT wants, and fails on one thing alone."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.targets.qdq_requirements import (
    DataScales,
    FloatBiases,
    Integers,
    Opsets,
    Pairs,
    WeightScales,
    WholeOperands,
    ZeroPoints,
)
from qcompile.targets.requirements import Requirement, examine
from qcompile.targets.tensorrt import TENSORRT

F32 = np.float32
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
    return parse(f"g (float[N,4] x) => (float[N,6] y) {{ {body} }}", 20, **values)


def faults(requirement: Requirement, body: str, **changed: Array) -> list[str]:
    return [str(f) for f in examine(graph(body, **changed), (requirement,)).faults]


def test_the_form_that_tensorrt_wants_passes_every_rule() -> None:
    found = examine(graph(GOOD), TENSORRT.requires)
    assert found.faults == []
    assert found.checked == {
        "operators": 5, "integer-types": 3, "zero-points": 3, "data-scales": 3,
        "weight-scales": 1, "float-biases": 0, "whole-operands": 1, "pairs": 3,
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
