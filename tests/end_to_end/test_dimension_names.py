"""What ONNX Runtime runs is accepted, whatever the names of dimensions say, with its answers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.compiler.stages.options import CompileOptions
from qcompile.quant import Array, sqnr_db
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.session import Session

Feed = dict[str, Array]
UNTIMED = CompileOptions(bench=False)
IMAGE = """g (float[None,3,None,None] x) => (float[None,4,None,None] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, v) r = Relu(c) y = Conv<pads = [1, 1, 1, 1]>(r, w)
}"""
TOWERS = """g (float[batch,8] a, float[batch,8] b) => (float[batch,batch] y) {
    s = MatMul(a, v) t = MatMul(b, w) u = Transpose<perm = [1, 0]>(t) y = MatMul(s, u)
}"""
PAST = """g (float[L,B,8] past, float[B,L,8] x) => (float[B,M,4] y) {
    p = Transpose<perm = [1, 0, 2]>(past) c = Concat<axis = 1>(p, x) y = MatMul(c, w)
}"""


def image(n: int) -> Feed:
    return {"x": normal(4, 3, 8 + n, 12, seed=n)}


def towers(n: int) -> Feed:
    return {"a": normal(4, 8, seed=n), "b": normal(7 + n, 8, seed=n + 1)}


def past(n: int) -> Feed:
    return {"past": normal(3 * (n % 2), 2, 8, seed=n), "x": normal(2, 5, 8, seed=n + 1)}


MODELS = {
    "image": (model_proto(IMAGE, v=normal(8, 3, 3, 3), w=normal(4, 8, 3, 3)), image),
    "towers": (model_proto(TOWERS, v=normal(8, 16), w=normal(8, 16, seed=1)), towers),
    "past": (model_proto(PAST, w=normal(8, 4)), past),
}


@pytest.mark.parametrize("target", ["cpu", "qdq"])
@pytest.mark.parametrize("name", MODELS)
def test_contradicted_names_are_no_obstacle(name: str, target: str) -> None:
    model, feed = MODELS[name]
    data = [feed(n) for n in range(4)]
    result = qcompile.compile(model, data=data, target=target, options=UNTIMED)
    expected = [Session(model.SerializeToString()).run(one)["y"] for one in data]
    found = [Session(result.model).run(one)["y"] for one in data]
    assert min(map(sqnr_db, expected, found)) > 20


def test_initializers_may_be_inputs() -> None:
    """As in IR version 3, where they had to be."""
    model = model_proto("g (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(8, 4))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [8, 4]))
    model.ir_version = 3
    result = qcompile.compile(model, data=[{"x": normal(64, 8)}], options=UNTIMED)
    assert list(Session(result.model).inputs) == ["x"]
    assert np.isfinite(Session(result.model).run({"x": normal(2, 8)})["y"]).all()
