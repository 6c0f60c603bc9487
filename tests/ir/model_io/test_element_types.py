"""Element types of inner tensors, found by the rules of operators."""

from __future__ import annotations

from onnx import TensorProto

from qcompile.ir.model_io.element_types import element_types
from qcompile.rewriting.testing import model_proto


def test_types_follow_zero_points_and_movers() -> None:
    model = model_proto(
        """g (float[2,4] x, uint8[2,4] u) => (float[2,2] y)
        <float s = {0.1}, int8 z = {0}, uint8 o = {3}, int8[4,2] w = {1,2,3,4,5,6,7,8}>
        { a = QuantizeLinear(x, s, z)
          b = QuantizeLinear(x, s)
          c = Transpose(a)
          d, e, f = DynamicQuantizeLinear(x)
          m = QLinearMatMul(u, s, o, w, s, z, s, z)
          g1 = com.microsoft.QGemm(u, s, o, w, s, z)
          g2 = com.microsoft.QGemm(u, s, o, w, s, z, , s, o)
          r = QuantizeLinear<output_dtype = 3>(x, s)
          h = Relu(x)
          y = Cast<to = 1>(m) }"""
    )
    found = element_types(model.graph)
    int8, uint8 = int(TensorProto.INT8), int(TensorProto.UINT8)
    expected = {"a": int8, "b": uint8, "c": int8, "d": uint8, "m": int8, "g2": uint8, "r": int8}
    assert expected.items() <= found.items()
    assert not {"g1", "h"} & set(found)  # nothing is known of these
    assert found["y"] == TensorProto.FLOAT == found["x"]


def test_types_of_results_without_a_zero_point_are_those_of_the_data() -> None:
    model = model_proto(
        """g (int8[1,2,4,4] x, uint8[1,2,4,4] u, bool c) => (int8[1,2,4,4] y)
        <float s = {0.1}, int8 z = {0}, uint8 o = {3}>
        { a = com.microsoft.QLinearAdd(x, s, z, x, s, z, s)
          p = com.microsoft.QLinearAveragePool<kernel_shape = [2, 2]>(u, s, o, s, o)
          w = com.microsoft.QLinearWhere(c, x, s, z, x, s, z, s, z)
          m = com.microsoft.QLinearReduceMean<axes = [1]>(x, s, z, s, z)
          y = Identity(a) }"""
    )
    found = element_types(model.graph)
    kinds = [found.get(name) for name in "apwm"]
    int8, uint8 = int(TensorProto.INT8), int(TensorProto.UINT8)
    assert kinds == [int8, uint8, int8, int8]
