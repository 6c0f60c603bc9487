"""The form that shows float16's rounding on a provider that computes it in float32."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from qcompile.errors import ModelError
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.evaluation.float16_emulation import rounding_form
from qcompile.runtime.session import Session, SessionOptions

F16, F32 = np.float16, np.float32


def model(text: str, **weights: Array) -> bytes:
    made = model_proto(text, **weights)
    typed: bytes = onnx.shape_inference.infer_shapes(made).SerializeToString()
    return typed


def run(data: bytes, **feed: Array) -> Array:
    """y as written and as ONNX Runtime optimizes it: they must agree to the last bit."""
    plain, fast = (Session(data, SessionOptions(1, o)).run(feed)["y"] for o in (False, True))
    np.testing.assert_array_equal(plain, fast)
    return plain


TWICE = """g (float[N,1] x) => (float[N,1] y) {
    h = Cast<to = 10>(x) a = MatMul(h, w) b = MatMul(a, v) y = Cast<to = 1>(b)
}"""


def test_an_overflow_shows_which_the_cpu_provider_hides() -> None:
    weights = {"w": np.array([[200]], F16), "v": np.array([[0.01]], F16)}
    data, x = model(TWICE, **weights), np.array([[1000]], F32)
    assert np.isfinite(Session(data).run({"x": x})["y"]).all()
    assert np.isinf(run(rounding_form(data), x=x)).all()


def test_each_result_is_rounded_where_it_is_stored() -> None:
    """1 + 2^-10 squared is 1 + 2^-9 + 2^-20, which float16 rounds to 1 + 2^-9."""
    w = np.array([[1 + 2**-10]], F16)
    got = run(rounding_form(model(TWICE, w=w, v=w)), x=np.array([[1]], F32))
    assert got == np.float32(1 + 2**-9)


def test_what_float32_makes_too_large_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = model(TWICE, w=np.ones((1, 1), F16), v=np.ones((1, 1), F16))
    monkeypatch.setattr("qcompile.runtime.evaluation.float16_emulation.PROTOBUF_LIMIT", 100)
    with pytest.raises(ModelError, match="over protobuf's 2 GiB limit"):
        rounding_form(data)


def test_a_float32_model_is_returned_as_it_is() -> None:
    data = model("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    assert rounding_form(data) is data


def test_inputs_outputs_and_constants_keep_names_and_types() -> None:
    text = """g (float16[N] x, float16[1] c) => (float16[N] y, float16[1] c2) {
        y = Add(x, c) c2 = Identity(c)
    }"""
    form = rounding_form(model(text, c=np.array([2], F16)))
    found = Session(form).run({"x": np.array([1, 3], F16)})
    assert [v.dtype for v in found.values()] == [F16, F16]
    np.testing.assert_array_equal(found["y"], np.array([3, 5], F16))


@pytest.mark.parametrize("flag", [True, False])
def test_subgraphs_read_what_they_read_before(flag: bool) -> None:
    text = """g (bool c, float16[N] x, float16[1] k) => (float16[N] y) {
        d = Add(x, k)
        y = If (c) <
            then_branch = yes () => (float16[N] p) { p = Add(d, k) },
            else_branch = no () => (float16[N] q) { q = Identity(d) }
        >
    }"""
    form = rounding_form(model(text, k=np.array([1], F16)))
    y = Session(form).run({"c": np.array(flag), "x": np.array([1, 2], F16)})["y"]
    np.testing.assert_array_equal(y, np.array([3, 4] if flag else [2, 3], F16))


def test_results_of_a_body_are_of_the_types_that_it_declares() -> None:
    text = """g (float16[N] x, float16[T,N] xs) => (float16[T,N] y) {
        last, all = Scan (x, xs) <num_scan_inputs = 1, body = b (float16[N] h, float16[N] e)
            => (float16[N] s, float16[N] o) { s = Add(h, e) o = Identity(s) }>
        y = Mul(all, k)
    }"""
    form = rounding_form(model(text, k=np.array(2, F16)))
    y = Session(form).run({"x": np.array([1], F16), "xs": np.array([[1], [2]], F16)})["y"]
    np.testing.assert_array_equal(y, np.array([[4], [8]], F16))
