"""Q/DQ convolutions become QLinearConv, with activation and bias inside."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.fusion.fit_biases import FitBiases
from qcompile.passes.lower.lower_convolutions import LowerConvolutions
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)
from qcompile.runtime.session import optimized_ops

F32 = np.float32
# The same integers go in, so only what lies half way between two of the output's may differ: a step
# of 0.1. The bias is rounded to whole products of scales, 6/255 · 2/127: far below a step.
STEP = 0.1
PREFIX = """
    xq = QuantizeLinear(x, sx, zx)
    xd = DequantizeLinear(xq, sx, zx)
    wd = DequantizeLinear<axis = 0>(wq, sw)
"""
QUANTIZED = "q = QuantizeLinear({0}, so, zo) y = DequantizeLinear(q, so, zo)"
FUSED = "CHECK: %q/convolution = QLinearConv(%xq, @sx{{[^,]+}}, @zx{{[^,]+}}, @wq:i8"


def convolution(
    body: str,
    x: str = "float[B,4,8,8] x",
    out: str = "float[B,3,N,N] y",
    prefix: str = PREFIX,
    **changed: Array,
) -> Graph:
    ints = np.random.default_rng(0)
    weights: dict[str, Array] = {
        "sx": np.array(6 / 255, F32),
        "zx": np.array(128, np.uint8),
        "wq": ints.integers(-127, 128, (3, 4, 3, 3), np.int8),
        "sw": np.array([1, 2, 0.5], F32) / 127,
        "b": normal(3),
        "so": np.array(STEP, F32),
        "zo": np.array(128, np.uint8),
        "low": np.array(-3, F32),
        "high": np.array(6, F32),
        **changed,
    }
    return parse(f"g ({x}) => ({out}) {{ {prefix} {body} }}", **weights)


def test_one_scale_for_all_weights() -> None:
    graph = convolution("c = Conv(xd, wd, b) " + QUANTIZED.format("c"), sw=np.array(1 / 127, F32))
    differential(graph, LowerConvolutions(), atol=STEP * 1.001)
    check(graph, "CHECK: QLinearConv(%xq, {{.*}}, @wq/zero_point:i8[]=0, {{.*}}, @b/int32")


def test_an_int32_bias_keeps_its_integers() -> None:
    """As tools export it: with the scale s · t, by which the operator expects it."""
    steps = np.array([1, 2, 0.5], F32) / F32(127)
    unit = (F32(6 / 255) * steps).astype(F32)
    values = np.array([100, -70, 3], np.int32)
    graph = convolution(
        "c = Conv(xd, wd, bias) " + QUANTIZED.format("c"),
        prefix=PREFIX + " bias = DequantizeLinear<axis = 0>(bq, u) ",
        sw=steps,
        bq=values,
        u=unit,
    )
    differential(graph, LowerConvolutions(), atol=STEP * 1.001)
    check(graph, "CHECK: QLinearConv({{.*}}, @bias/float/int32:i32[3]=[100, -70, 3])")


def test_convolution_bias_and_quantizer_become_one_node() -> None:
    graph = convolution("c = Conv<pads = [1, 1, 1, 1]>(xd, wd, b) " + QUANTIZED.format("c"))
    differential(graph, LowerConvolutions(), atol=STEP * 1.001)
    check(graph, FUSED + "\nCHECK-NOT: {{ = Conv\\(}}")
    assert optimized_ops(serialize(graph))["com.microsoft.QLinearConv"] == 1


@pytest.mark.parametrize(
    "form",
    [
        ("float[B,4,9] x", "float[B,3,N] y", (3, 4, 3), ""),
        ("float[B,4,5,5,5] x", "float[B,3,N,N,N] y", (3, 4, 2, 2, 2), ""),
        ("float[B,6,8,8] x", "float[B,3,N,N] y", (3, 2, 3, 3), "<group = 3, strides = [2, 2]>"),
        ("float[B,4,8,8] x", "float[B,3,N,N] y", (3, 4, 3, 3), '<auto_pad = "SAME_UPPER">'),
    ],
    ids=["1d", "3d", "groups", "auto_pad"],
)
def test_every_shape_of_convolution(form: tuple[str, str, tuple[int, ...], str]) -> None:
    x, out, shape, attributes = form
    wq = np.random.default_rng(1).integers(-127, 128, shape, np.int8)
    body = f"c = Conv{attributes}(xd, wd) " + QUANTIZED.format("c")
    graph = convolution(body, x, out, wq=wq)
    differential(graph, LowerConvolutions(), atol=STEP * 1.001)
    check(graph, FUSED)


@pytest.mark.parametrize(
    ("activation", "zero"),
    [("r = Relu(c)", 0), ("r = Clip(c, , high)", 200), ("r = Clip(c, low, )", 30)],
)
def test_an_activation_that_saturation_does_vanishes(activation: str, zero: int) -> None:
    """Steps of 0.1: integers hold -20 to 5.5, -3 to 22.5, 0 to 25.5."""
    body = f"c = Conv(xd, wd, b) {activation} " + QUANTIZED.format("r")
    graph = convolution(body, zo=np.array(zero, np.uint8))
    differential(graph, LowerConvolutions(), atol=STEP * 1.001)
    check(graph, FUSED + "\nCHECK-NOT: {{Relu|Clip}}")


def test_an_activation_that_cuts_deeper_stays() -> None:
    body = "c = Conv(xd, wd, b) r = Relu(c) " + QUANTIZED.format("r")
    assert_refused(convolution(body), LowerConvolutions(), "clips more than its quantizer does")


def overflowing() -> Graph:
    """Its first bias would be -3e9 products of scales."""
    tiny, bias = np.array([1e-9, 1, 0.5], F32) / 127, np.array([-5, 1, 2], F32)
    return convolution("c = Conv(xd, wd, b) " + QUANTIZED.format("c"), sw=tiny, b=bias)


def test_a_bias_that_was_made_to_fit_is_lowered() -> None:
    graph, ctx = overflowing(), context()
    ctx.origins["wq"] = ("w", None)
    differential(graph, FitBiases(), LowerConvolutions(), atol=STEP * 1.001, ctx=ctx)
    whole = array(graph.constants()["b/int32"])
    assert np.abs(whole).max() == pytest.approx(2**30, rel=2.0**-22)  # the scale is float32
    check(graph, "CHECK: QLinearConv({{.*}}@wq/fewer:i8{{.*}}@sw/larger:f32[3]")


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (convolution("y = Conv(xd, wd)"), "not quantized, or has other readers"),
        (
            convolution(
                "c = Conv(xd, wd) z = Neg(c) " + QUANTIZED.format("c"),
                out="float[B,3,N,N] y, float[B,3,N,N] z",
            ),
            "other readers",
        ),
        (
            convolution(
                "c = Conv(xd, wd) y = QuantizeLinear(c, so, zo)", out="uint8[B,3,N,N] y"
            ),
            "its quantized result is a graph output",
        ),
        (
            convolution("c = Conv(xd, wd) " + QUANTIZED.format("c"), zo=np.array(1, np.int8)),
            "its result is not uint8",
        ),
        (
            convolution("c = Conv(xd, wd) " + QUANTIZED.format("c"), zx=np.array(1, np.int8)),
            "the data is not uint8",
        ),
        (
            convolution("n = Neg(b) c = Conv(xd, wd, n) " + QUANTIZED.format("c")),
            "the bias is not constant",
        ),
        (overflowing(), "the bias does not fit int32"),
        (
            convolution(
                "c = Conv(xd, wd) " + QUANTIZED.format("c"),
                prefix=PREFIX.replace("axis = 0", "axis = 1"),
                sw=np.full(4, 0.1, F32),
            ),
            "not along the output channels",
        ),
        (
            convolution(
                "c = Conv(xd, wd) " + QUANTIZED.format("c"),
                prefix=PREFIX.replace("sw)", "sw, zw)"),
                zw=np.ones(3, np.int8),
            ),
            "the weight is not symmetric",
        ),
    ],
)  # fmt: skip
def test_what_the_operator_cannot_say_stays(graph: Graph, reason: str) -> None:
    assert_refused(graph, LowerConvolutions(), reason)


def test_float_convolutions_are_no_refusal() -> None:
    graph = convolution("y = Conv(x, wd)")
    assert run_pass(graph, LowerConvolutions()).skips == []
