"""Quantizers that float16 cannot hold stay float32, with the operands of the same operator."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.planning import float32_quantizers
from qcompile.quant import Array
from qcompile.rewriting.testing import parse

F32 = np.float32
TEXT = """g (float[B,4] x) => (float[B,6] y) {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) t = Transpose<perm = [0, 1]>(d)
    w = DequantizeLinear<axis = 1>(wq, ws, wz) y = MatMul(t, w)
}"""


def reasons(**changed: Array) -> dict[str, str]:
    values: dict[str, Array] = {
        "s": np.array(0.1, F32),
        "z": np.array(0, np.int8),
        "wq": np.arange(24, dtype=np.int8).reshape(4, 6),
        "ws": np.full(6, 0.1, F32),
        "wz": np.zeros(6, np.int8),
        **changed,
    }
    found = float32_quantizers(parse(TEXT, 21, **values))
    return {name: refusal.reason for name, refusal in found.items()}


def test_ordinary_scales_fit() -> None:
    assert reasons() == {}
    assert reasons(ws=np.full(6, 2.0**-20, F32)) == {}  # small, and a float16 number


@pytest.mark.parametrize("scale", [1e-9, 1.3e-7, 1e5])
def test_scales_that_float16_cannot_hold(scale: float) -> None:
    found = reasons(ws=np.full(6, scale, F32))
    assert found["DequantizeLinear:w"] == "float16 cannot hold its scale 'ws'"
    other = "MatMul 'MatMul:y' also reads what is dequantized in float32"
    assert found["DequantizeLinear:d"] == other and len(found) == 2


def test_results_beyond_float16() -> None:
    found = reasons(s=np.array(600, F32))
    reason = "its results reach 76,800, and float16 ends at 65,504"
    assert found["DequantizeLinear:d"] == reason
    assert "DequantizeLinear:w" in found and "QuantizeLinear:q" not in found


def test_sixteen_bit_integers() -> None:
    found = reasons(z=np.array(0, np.int16))
    assert found["QuantizeLinear:q"] == "int16 has more digits than float16"


def test_computed_scales() -> None:
    text = TEXT.replace("{\n", "{\n a = Abs(x) s = ReduceMax<keepdims = 0>(a) ")
    values: dict[str, Array] = {
        "z": np.array(0, np.int8),
        "wq": np.ones((4, 6), np.int8),
        "ws": np.full(6, 0.1, F32),
        "wz": np.zeros(6, np.int8),
    }
    found = float32_quantizers(parse(text, 21, **values))
    assert found["QuantizeLinear:q"].reason == "its scale is computed"
