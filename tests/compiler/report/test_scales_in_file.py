"""Scales as they stand in a graph: of data, of constants, in standard and in contrib operators."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.compiler.report.scales_in_file import Quantizer, read_quantizers
from qcompile.errors import ModelError
from qcompile.rewriting.testing import model_proto

TEXT = """g (float[N,2] x, float dyn) => (float[N,2] y, float[N,2] z)
<float s = {0.5}, uint8 zp = {3}, int8[2,2] w = {1,2,3,4}, float[2] ws = {0.25, 0.125},
 int8[2] wz = {0,0}, int8[2,2] v = {5,6,7,8}, float vs = {2.0}>
{
    q = QuantizeLinear(x, s, zp)
    y = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, zp, wz)
    d = DequantizeLinear(v, vs)
    p = QuantizeLinear(x, dyn)
    r = DequantizeLinear(p, dyn)
    z = MatMul(r, d)
}"""


def test_each_tensor_once_with_its_own_scale() -> None:
    found = read_quantizers(model_proto(TEXT))
    assert set(found) == {"x", "w", "v"}  # not q: x is what it stands for; not what is computed
    assert found["x"].to_dict() == {"scale": 0.5, "zero_point": 3}
    assert found["v"].to_dict() == {"scale": 2.0, "zero_point": 0}
    many = found["w"].to_dict()
    assert (many["scales"], many["lowest"], many["highest"]) == (2, 0.125, 0.25)


def test_the_digest_sees_scales_and_zero_points() -> None:
    scale, zero = np.array([1.0, 2.0], np.float32), np.zeros(2, np.int8)
    base = Quantizer("w", scale, zero).digest()
    assert base == Quantizer("w", scale.copy(), zero).digest()
    assert base != Quantizer("w", scale, zero + np.int8(1)).digest()
    assert base != Quantizer("w", scale * 2, zero).digest()


def test_a_damaged_scale_is_named() -> None:
    model = model_proto(TEXT)
    broken = next(t for t in model.graph.initializer if t.name == "ws")
    broken.ClearField("float_data")
    broken.raw_data = b"\0" * 5
    with pytest.raises(ModelError, match="tensor 'ws' of shape"):
        read_quantizers(model)


def test_constants_of_operators_that_are_no_linears() -> None:
    found = read_quantizers(
        model_proto(
            """g (uint8[2] x, uint8[1,2,2] y) => (uint8[2] a, uint8[4] c, float[1,2,2] e)
            <float s = {0.5}, float t = {0.25}, uint8 z = {3}, uint8[2] v = {1,2},
             uint8[2] w = {5,6}, int8[2,6] k = {1,2,3,4,5,6,7,8,9,10,11,12}, int8 o = {7},
             float[6] b = {0,0,0,0,0,0}>
            {
                a = com.microsoft.QLinearAdd(x, s, z, v, t, z, s, z)
                c = com.microsoft.QLinearConcat(s, z, x, s, z, w, s)
                e = com.microsoft.QAttention<num_heads = 1>(y, k, b, s, t, , z, o)
            }"""
        )
    )
    assert {name: q.to_dict() for name, q in found.items()} == {
        "v": {"scale": 0.25, "zero_point": 3},
        "w": {"scale": 0.5, "zero_point": 0},
        "k": {"scale": 0.25, "zero_point": 7},
    }
