"""Models in float16 and bfloat16, in arithmetic or only in storage, compiled in every way."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.compiler.stages.models import computes_in_bfloat16
from qcompile.compiler.stages.options import CompileOptions
from qcompile.compiler.stages.result import RejectedError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import Session

UNTIMED = CompileOptions(bench=False)
BFLOAT16 = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16))
WAYS = [
    {"target": target, "mode": mode}
    for target, modes in {
        "cpu": ("static", "dynamic", "weight-only", "float"),
        "qdq": ("static", "weight-only", "float"),
        "cuda": ("weight-only", "float"),
        "tensorrt": ("static",),
    }.items()
    for mode in modes
]
W, V = normal(64, 128) / 8, normal(128, 32, seed=1) / 11


def weights(dtype: Any) -> dict[str, Array]:
    return {"w": W.astype(dtype), "v": V.astype(dtype)}


def arithmetic(kind: str, dtype: Any) -> bytes:
    """float32 in and out, or float16; everything between in 16 bits."""
    number = {"float16": 10, "bfloat16": 16}[kind]
    if kind == "float16":
        ends = "float16[B,64] x", "float16[B,32] y", "c = Identity(x)", "y = Identity(n)"
    else:
        ends = (
            "float[B,64] x",
            "float[B,32] y",
            f"c = Cast<to = {number}>(x)",
            "y = Cast<to = 1>(n)",
        )
    text = f"g ({ends[0]}) => ({ends[1]}) {{ {ends[2]} m = MatMul(c, w) r = Relu(m)"
    return serialize(parse(f"{text} n = MatMul(r, v) {ends[3]} }}", **weights(dtype)))


def stored(dtype: Any) -> bytes:
    text = """g (float[B,64] x) => (float[B,32] y) {
        f = Cast<to = 1>(w) m = MatMul(x, f) r = Relu(m) k = Cast<to = 1>(v) y = MatMul(r, k)
    }"""
    return serialize(parse(text, **weights(dtype)))


MODELS = {
    "float16": (arithmetic("float16", np.float16), np.float16),
    "bfloat16": (arithmetic("bfloat16", BFLOAT16), np.float32),
    "stored float16": (stored(np.float16), np.float32),
    "stored bfloat16": (stored(BFLOAT16), np.float32),
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['target']}-{way['mode']}")
@pytest.mark.parametrize("name", MODELS)
def test_is_compiled_as_float32_would_be(name: str, way: dict[str, Any]) -> None:
    model, dtype = MODELS[name]
    feeds = [{"x": normal(8, 64, seed=i).astype(dtype)} for i in range(4)]
    result = qcompile.compile(model, feeds, options=UNTIMED, **way)
    x = normal(16, 64, seed=9).astype(dtype)
    found = Session(result.model).run({"x": x})["y"]
    expected = np.maximum(x.astype(np.float32) @ W, 0) @ V
    assert found.dtype == dtype
    noise = np.square(found - expected).sum() / np.square(expected).sum()
    assert noise < 1e-2
    # with scales, which are by block in mode weight-only, and names
    share = {"float": 1.08, "weight-only": 0.9}.get(way["mode"], 0.65)
    assert len(result.model) < share * len(model)
    text = " ".join([*result.report.note_texts, *(s.reason for s in result.report.skips)])
    assert not any(w in text for w in ("two activations", "integer weights", "nothing was"))
    assert ("computes in bfloat16" in text) == (name == "bfloat16")


def test_weights_keep_their_names_for_patterns() -> None:
    model, _ = MODELS["stored float16"]
    result = qcompile.compile(model, keep_float=["w"], options=UNTIMED, mode="dynamic")
    weights = (r for r in result.report.ledger if r.kind == "weight")
    rows = {r.tensor.partition("/")[0]: r for r in weights}
    assert (rows["w"].dtype, rows["v"].dtype) == ("float16", "int8")
    assert rows["w"].reason == "kept float by pattern 'w'"


def test_an_output_that_overflows_float16_is_named() -> None:
    graph = parse(
        """g (float16[B,64] x) => (float16[B,32] y) {
            m = MatMul(x, w) n = MatMul(m, v) q = Mul(n, k) y = Mul(q, k)
        }""",
        **weights(np.float16),
        k=np.array(400, np.float16),
    )
    feeds = [{"x": normal(8, 64, seed=i).astype(np.float16)} for i in range(4)]
    with pytest.raises(
        RejectedError, match="own output 'y' holds NaN or infinity for 1 of 1 feeds"
    ):
        qcompile.compile(serialize(graph), feeds, options=UNTIMED)


def test_casts_alone_are_no_bfloat16_arithmetic() -> None:
    text = "g (float[B,64] x) => (float[B,64] y) {{ a = Cast<to = 16>(x) {} y = Cast<to = 1>(b) }}"
    assert not computes_in_bfloat16(parse(text.format("b = Cast<to = 16>(a)")))
    assert computes_in_bfloat16(parse(text.format("b = Neg(a)")))


def in_bodies(dtype: Any) -> bytes:
    """The bodies of an If read 16-bit constants of the graph, large and small, and x in 16 bits."""
    number = {"float16": 10, "bfloat16": 16}[dtype.name]
    text = f"""g (float[B,64] x, bool c) => (float[B,128] y) {{
        h = Cast<to = {number}>(x)
        i = If (c) <
            then_branch = yes () => ({dtype.name}[B,128] p) {{ a = MatMul(h, w) p = Add(a, b) }},
            else_branch = no () => ({dtype.name}[B,128] q) {{ d = MatMul(h, w) q = Sub(d, b) }}
        >
        y = Cast<to = 1>(i)
    }}"""
    return serialize(parse(text, w=W.astype(dtype), b=normal(128).astype(dtype)))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=lambda t: str(t.name))
@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only", "float"])
def test_bodies_compute_in_float32_by_constants_of_16_bits(dtype: Any, mode: Any) -> None:
    given = in_bodies(dtype)
    feeds = [{"x": normal(4, 64, seed=k), "c": np.array(k % 2 == 0)} for k in range(6)]
    result = qcompile.compile(given, feeds, mode=mode, options=UNTIMED)
    onnx.checker.check_model(result.model)
    assert result.report.verdict is not None and result.report.verdict.worst_cosine > 0.99
    assert "w" in {row.tensor for row in result.report.ledger}
    if mode == "float":
        assert len(result.model) < 1.1 * len(given)


def test_scales_are_not_reported_as_weights_that_do_not_fit() -> None:
    text = """g (float[B,64] x, int64[B] ids) => (float[B,64] y, float[B,64] z) {
        f = Cast<to = 1>(w) y = MatMul(x, f) t = Cast<to = 1>(v) z = Gather(t, ids)
    }"""
    w, v = normal(64, 64).astype(np.float16), normal(300, 64, seed=1).astype(np.float16)
    feeds = [{"x": normal(4, 64, seed=k), "ids": np.arange(4)} for k in range(6)]
    result = qcompile.compile(
        serialize(parse(text, w=w, v=v)), feeds, mode="weight-only", options=UNTIMED
    )
    assert not [s for s in result.report.skips if s.pass_name == "store-half"]


def test_a_body_in_bfloat16_without_weights() -> None:
    text = """g (float[B,64] x, bool c) => (float[B,128] y) {
        h = Cast<to = 16>(x) m = MatMul(h, w)
        i = If (c) <
            then_branch = yes () => (bfloat16[B,128] p) { p = Relu(m) },
            else_branch = no () => (bfloat16[B,128] q) { q = Tanh(m) }
        >
        y = Cast<to = 1>(i)
    }"""
    feeds = [{"x": normal(4, 64, seed=k), "c": np.array(k % 2 == 0)} for k in range(6)]
    given = serialize(parse(text, w=W.astype(BFLOAT16)))
    report = qcompile.compile(given, feeds, mode="dynamic", options=UNTIMED).report
    assert report.verdict is not None and report.verdict.worst_cosine > 0.99


def test_bfloat16_inside_a_body_alone_is_found() -> None:
    text = """g (float[B,64] x, bool c) => (float[B,128] y) {
        y = If (c) <
            then_branch = yes () => (float[B,128] p) {
                h = Cast<to = 16>(x) m = MatMul(h, w) p = Cast<to = 1>(m) },
            else_branch = no () => (float[B,128] q) { v = Cast<to = 1>(w) q = MatMul(x, v) }
        >
    }"""
    graph = parse(text, w=W.astype(BFLOAT16))
    assert computes_in_bfloat16(graph)
    feeds = [{"x": normal(4, 64, seed=k), "c": np.array(k % 2 == 0)} for k in range(6)]
    report = qcompile.compile(serialize(graph), feeds, mode="dynamic", options=UNTIMED).report
    assert report.verdict is not None and report.verdict.worst_cosine > 0.99
