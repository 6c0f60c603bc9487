"""Weights get scales with which ONNX Runtime's int32 biases are right."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.fusion.fit_biases import FitBiases
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)
from qcompile.runtime.session import Session, SessionOptions

F32 = np.float32
STEP = F32(6 / 255)
HEAD = """g ({0} x) => ({1} y) {{
    xq = QuantizeLinear(x, sx, zx) xd = DequantizeLinear(xq, sx, zx)
    wd = DequantizeLinear<axis = {2}>(wq, sw, zw)
"""
TAIL = " q = QuantizeLinear(c, so, zo) y = DequantizeLinear(q, so, zo) }"
CONV = HEAD.format("float[N,4,6,6]", "float[N,3,4,4]", 0) + "c = Conv(xd, wd, b)" + TAIL
GEMM = HEAD.format("float[N,8]", "float[N,3]", 0) + "c = Gemm<transB = 1>(xd, wd, b)" + TAIL
MATMUL = HEAD.format("float[N,8]", "float[N,3]", 1) + "m = MatMul(xd, wd) c = Add(m, b)" + TAIL
SHAPES = {CONV: (3, 4, 3, 3), GEMM: (3, 8), MATMUL: (8, 3)}
TINY = np.array([1e-9, 1, 0.5], F32) / 127


def layer(text: str, bias: Array, sw: Array = TINY, wq: Array | None = None) -> Graph:
    ints = np.random.default_rng(0)
    return parse(
        text,
        sx=np.array(STEP),
        zx=np.array(128, np.uint8),
        wq=ints.integers(-127, 128, SHAPES[text], np.int8) if wq is None else wq,
        sw=sw,
        zw=np.zeros(3, np.int8),
        b=bias.astype(F32),
        so=np.array(0.1, F32),
        zo=np.array(128, np.uint8),
    )


def ours() -> Context:
    """A context in which the weight is one that qcompile has quantized."""
    ctx = context("qdq")
    ctx.origins["wq"] = ("w", 40.0)
    return ctx


@pytest.mark.parametrize("text", SHAPES, ids=["conv", "gemm", "matmul"])
def test_what_the_runtime_computes_is_what_the_graph_says(text: str) -> None:
    """Unoptimized, biases are float. The trap: optimized, the first bias wraps around in int32."""
    bias = np.array([-5, 1, 2])
    feed = {"x": normal(2, *((4, 6, 6) if text is CONV else (8,)))}
    graph = layer(text, bias)
    exact = outputs(graph, feed)["y"]
    session = SessionOptions(threads=1)
    if text is CONV:
        wrapped = Session(serialize(graph), session).run(feed)["y"]
        assert np.abs(wrapped - exact).max() > 1
    differential(graph, FitBiases(), atol=0.1001, ctx=ours())  # may round half way otherwise
    found = Session(serialize(graph), session).run(feed)["y"]
    np.testing.assert_allclose(found, exact, atol=0.1001)


def test_golden() -> None:
    graph = layer(CONV, np.array([-5, 1, 2]))
    ctx = run_pass(graph, FitBiases(), ctx=ours())
    check(graph, "CHECK: %wd = DequantizeLinear(@wq/fewer:i8{{.*}}@sw/larger:f32[3]")
    scales = array(graph.constants()["sw/larger"])
    np.testing.assert_array_equal(scales[1:], TINY[1:])
    assert 5 / (STEP * scales[0]) == pytest.approx(2**30)
    assert ctx.origins["wq/fewer"] == ("w", 40.0)


def test_a_channel_of_zeros_does_not_round_its_bias() -> None:
    """With a scale of 1, steps of the bias would be those of the data: 0.0235."""
    weight = np.zeros(SHAPES[GEMM], np.int8)
    graph = layer(GEMM, np.array([0.4, 0, 0]), np.ones(3, F32), weight)
    run_pass(graph, FitBiases(), ctx=ours())
    scales = array(graph.constants()["sw/larger"])
    assert round(float(F32(0.4) / (STEP * scales[0]))) == 2**30
    assert (STEP * scales >= 2.0**-126).all()


def test_a_product_of_scales_that_float32_lacks_is_made_larger() -> None:
    """0 / 0 would be no number, and its int32 anything."""
    graph = layer(CONV, np.zeros(3), np.array([1e-43, 1, 1], F32))
    run_pass(graph, FitBiases(), ctx=ours())
    assert STEP * array(graph.constants()["sw/larger"])[0] >= F32(2.0**-126)


@pytest.mark.parametrize("bias", [np.ones(3), np.array([1e6, 1, 1])], ids=["usual", "large"])
def test_what_fits_stays(bias: Array) -> None:
    graph = layer(CONV, bias, np.ones(3, F32))
    assert run_pass(graph, FitBiases(), ctx=ours()).skips == []
    assert "sw/larger" not in graph.constants()


def test_weights_that_came_quantized_keep_their_scales() -> None:
    graph = layer(CONV, np.array([-5, 1, 2]))
    run_pass(graph, FitBiases())
    assert "sw/larger" not in graph.constants()


def test_a_bias_that_no_scale_fits_is_refused() -> None:
    graph = layer(CONV, np.full(3, 3e38), np.ones(3, F32))
    small = graph.constant("small", np.array(1e-30, F32))
    for node in graph.nodes[:2]:
        graph.set_input(node, 1, small)
    assert_refused(graph, FitBiases(), "no float32 scale", ctx=ours())
