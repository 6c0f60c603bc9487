"""Q/DQ products become ONNX Runtime's integer product, with the bias inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.lower_linears import LowerLinears
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

# Quantized values are the same before and after: only the sums of K = 8 products differ, exact
# integers against floats that round K + 3 times, with |x| <= 3 and |w| <= 3 in these tests.
ATOL = 2 * (8 + 3) * 2.0**-24 * (8 * 3 * 3)
QUANTIZED = """
    xq = QuantizeLinear(x, sx, zx)
    xd = DequantizeLinear(xq, sx, zx)
    wd = DequantizeLinear<axis = 1>(wq, sw)
"""
DYNAMIC = """
    xq, s, z = DynamicQuantizeLinear(x)
    xd = DequantizeLinear(xq, s, z)
    wd = DequantizeLinear<axis = 1>(wq, sw)
"""
BY_ROW = QUANTIZED.replace("axis = 1", "axis = 0")
ROWS = ("float[N,8] x", "float[N,4] y")
FUSED = (
    "CHECK: %y = com.microsoft.MatMulIntegerToFloat(%xq, @wq:i8[8,4]{{[^,]+}}, @sx:{{[^,]+}}, "
    "@sw:f32[4]{{[^,]+}}, @zx:{{[^,]+}}, none, @b"
)


def ints(*shape: int) -> Array:
    """Weights that use the whole range of symmetric int8."""
    return np.random.default_rng(0).integers(-127, 128, shape, np.int8)


def linear(
    body: str,
    x: str = "float[B,S,8] x",
    out: str = "float[B,S,4] y",
    prefix: str = QUANTIZED,
    **changed: Array,
) -> Graph:
    weights: dict[str, Array] = {
        "sx": np.array(6 / 255, np.float32),
        "zx": np.array(128, np.uint8),
        "wq": ints(8, 4),
        "sw": np.array([1, 2, 3, 0.5], np.float32) / 127,
        "b": normal(4),
        **changed,
    }
    return parse(f"g ({x}, bool c) => ({out}) {{ {prefix} {body} }}", **weights)


@pytest.mark.parametrize("sum_", ["Add(m, b)", "Add(b, m)"])
def test_product_and_bias_become_one_node(sum_: str) -> None:
    graph = linear(f"m = MatMul(xd, wd) y = {sum_}")
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, f"CHECK: %xq = QuantizeLinear(%x,\n{FUSED}\nCHECK-NOT: %m")


def test_dynamic_activation() -> None:
    graph = linear("m = MatMul(xd, wd) y = Add(m, b)", prefix=DYNAMIC)
    differential(graph, LowerLinears(), atol=ATOL)
    check(
        graph,
        """
        CHECK: %xq, %s, %z = DynamicQuantizeLinear(%x)
        CHECK-NEXT: MatMulIntegerToFloat(%xq, @wq:i8[8,4]{{[^,]+}}, %s, @sw{{[^,]+}}, %z, none, @b
        """,
    )


def test_one_quantized_input_for_query_key_and_value() -> None:
    graph = linear("q = MatMul(xd, wd) k = MatMul(xd, wd) s = Sub(q, k) y = Add(s, b)")
    run_pass(graph, LowerLinears())
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %xq = QuantizeLinear(
        CHECK-NEXT: [[Q:%[^ ]+]] = com.microsoft.MatMulIntegerToFloat(%xq, @wq:{{.*}}, none){{$}}
        CHECK-NEXT: [[K:%[^ ]+]] = com.microsoft.MatMulIntegerToFloat(%xq, @wq:{{.*}}, none){{$}}
        CHECK-NEXT: %s = Sub([[Q]], [[K]])
        CHECK-NEXT: %y = Add(%s, @b
        """,
    )


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_gemm_bias(shape: tuple[int, ...]) -> None:
    graph = linear("y = Gemm(xd, wd, b)", *ROWS, b=normal(*shape))
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, FUSED + (":f32[4]" if len(shape) == 1 else "/flat:f32[4]"))


def test_gemm_with_a_transposed_weight() -> None:
    graph = linear("y = Gemm<transB = 1>(xd, wd, b)", *ROWS, prefix=BY_ROW, wq=ints(4, 8))
    ctx = context()
    ctx.origins["wq"] = ("w", 40.0)
    differential(graph, LowerLinears(), atol=ATOL, ctx=ctx)
    check(graph, "CHECK: MatMulIntegerToFloat(%xq, @wq/transposed:i8[8,4]")
    np.testing.assert_array_equal(array(graph.constants()["wq/transposed"]), ints(4, 8).T)
    assert ctx.origins["wq/transposed"] == ("w", 40.0)


def test_gemm_without_a_bias_takes_the_sum_behind_it() -> None:
    graph = linear("m = Gemm(xd, wd, ) y = Add(m, b)", *ROWS)
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, FUSED)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 4), (3, 1)])
def test_a_gemm_bias_that_is_no_vector_is_added_outside(shape: tuple[int, ...]) -> None:
    """The result is a graph output: its name must belong to the sum, not to the product."""
    three = ("float[3,8] x", "float[3,4] y")
    graph = linear("y = Gemm(xd, wd, b)", *three, b=normal(*shape))
    differential(graph, LowerLinears(), atol=ATOL)
    check(
        graph,
        """
        CHECK: [[M:%[^ ]+]] = com.microsoft.MatMulIntegerToFloat(%xq, {{.*}}, none){{$}}
        CHECK-NEXT: %y = Add([[M]], @b
        """,
    )


def test_a_computed_gemm_bias_is_added_outside() -> None:
    graph = linear("n = Neg(b) m = Gemm(xd, wd, n) y = Relu(m)", *ROWS)
    differential(graph, LowerLinears(), atol=ATOL)
    check(
        graph,
        """
        CHECK: [[M:%[^ ]+]] = com.microsoft.MatMulIntegerToFloat(%xq, {{.*}}, none){{$}}
        CHECK-NEXT: [[S:%[^ ]+]] = Add([[M]], %n)
        CHECK-NEXT: %y = Relu([[S]])
        """,
    )


@pytest.mark.parametrize("shape", [(1,), (5, 4), (5, 1)])
def test_a_sum_that_is_no_bias_stays_a_sum(shape: tuple[int, ...]) -> None:
    five = ("float[B,5,8] x", "float[B,5,4] y")
    graph = linear("m = MatMul(xd, wd) y = Add(m, b)", *five, b=normal(*shape))
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, "CHECK: %y = Add(%m/int8, @b")


def test_a_bias_that_adds_a_dimension_stays_a_sum() -> None:
    wider = ("float[N,8] x", "float[1,N,4] y")
    graph = linear("m = MatMul(xd, wd) y = Add(m, b)", *wider, b=normal(1, 1, 4))
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, "CHECK: %y = Add(%m/int8, @b:f32[1,1,4]")


def test_a_sum_with_itself_is_no_bias() -> None:
    graph = linear("m = MatMul(xd, wd) y = Add(m, m)")
    differential(graph, LowerLinears(), atol=2 * ATOL)
    check(graph, "CHECK: %y = Add(%m/int8, %m/int8)")


BRANCHES = """z = If (c) <
    then_branch = yes () => (float[B,S,4] t) { t = Neg(m) },
    else_branch = no () => (float[B,S,4] f) { f = Abs(m) }
>"""


@pytest.mark.parametrize(
    ("output", "more"),
    [("z", "z = Relu(m)"), ("m", ""), ("z", BRANCHES)],
    ids=["second reader", "graph output", "subgraph"],
)
def test_a_product_that_is_read_elsewhere_keeps_its_bias_outside(output: str, more: str) -> None:
    out = f"float[B,S,4] y, float[B,S,4] {output}"
    graph = linear(f"m = MatMul(xd, wd) y = Add(m, b) {more}", out=out)
    feeds = [{"c": np.array(c), "x": normal(1, 3, 8)} for c in (True, False)]
    differential(graph, LowerLinears(), atol=ATOL, feeds=feeds)
    check(
        graph,
        """
        CHECK: [[M:%[^ ]+]] = com.microsoft.MatMulIntegerToFloat(%xq, {{.*}}, none){{$}}
        CHECK: %y = Add([[M]], @b
        """,
    )


def test_a_dequantized_tensor_may_have_other_readers() -> None:
    graph = linear("m = MatMul(xd, wd) a = Add(m, b) s = ReduceMean<axes = [-1]>(xd) y = Mul(a, s)")
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, "CHECK: %xd = DequantizeLinear(%xq")


def test_a_vector_of_data() -> None:
    graph = linear("m = MatMul(xd, wd) y = Add(m, b)", "float[8] x", "float[4] y")
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, FUSED)


@pytest.mark.parametrize("scale", [np.array(0.02, np.float32), np.array([0.02], np.float32)])
def test_one_scale_for_the_weight(scale: Array) -> None:
    graph = linear("m = MatMul(xd, wd) y = Add(m, b)", sw=scale)
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, "CHECK: MatMulIntegerToFloat(%xq, @wq:{{.*}}, @sw:")


def test_one_scale_as_a_vector_for_the_data() -> None:
    scale, zero = np.array([6 / 255], np.float32), np.array([128], np.uint8)
    graph = linear("m = MatMul(xd, wd) y = Add(m, b)", sx=scale, zx=zero)
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, FUSED)


def test_a_zero_point_of_zeros_is_none_for_the_weight() -> None:
    prefix = QUANTIZED.replace("(wq, sw)", "(wq, sw, zw)")
    graph = linear("m = MatMul(xd, wd) y = Add(m, b)", prefix=prefix, zw=np.zeros(4, np.int8))
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, FUSED)


def test_an_omitted_zero_point_is_zero() -> None:
    """Such models come from other tools."""
    prefix = QUANTIZED.replace("(xq, sx, zx)", "(xq, sx)")
    graph = linear("y = MatMul(xd, wd)", prefix=prefix, zx=np.array(0, np.uint8))
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, "CHECK: MatMulIntegerToFloat(%xq, @wq:{{.*}}, @sx:{{.*}}, @sw:{{.*}}, none, none)")


def test_nothing_is_dequantized_after_optimization() -> None:
    """As ONNX Runtime really runs it: one integer product a linear, no float weight, no sum."""
    body = "a = MatMul(xd, wd) y = Add(a, b)"
    for prefix, ops in (
        (QUANTIZED, {"QuantizeLinear": 1, "com.microsoft.MatMulIntegerToFloat": 1}),
        (DYNAMIC, {"com.microsoft.DynamicQuantizeMatMul": 1}),
    ):
        graph = linear(body, prefix=prefix)
        run_pass(graph, LowerLinears())
        assert optimized_ops(serialize(graph)) == ops


def test_a_weight_may_have_zero_points() -> None:
    prefix = QUANTIZED.replace("wq, sw", "wq, sw, zw")
    zero_points = np.array([1, -2, 0, 5], np.int8)
    graph = linear("y = MatMul(xd, wd)", *ROWS, prefix, zw=zero_points)
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, "CHECK: MatMulIntegerToFloat({{.*}}, @zw:i8[4]=[1, -2, 0, 5])")


@pytest.mark.parametrize(
    "body",
    ["y = Gemm(xd, wd, bias)", "m = MatMul(xd, wd) y = Add(m, bias)"],
)
def test_a_dequantized_bias_moves_inside(body: str) -> None:
    """It is int32 with the scale of the products, as tools export it."""
    prefix = QUANTIZED + " bias = DequantizeLinear<axis = 0>(bq, u) "
    integers = np.array([100, -70, 3, 0], np.int32)
    unit = np.full(4, 0.01, np.float32)
    graph = linear(body, *ROWS, prefix, bq=integers, u=unit)
    differential(graph, LowerLinears(), atol=ATOL)
    check(graph, "CHECK: MatMulIntegerToFloat({{.*}}, none, @bias/float:f32[4]")


EIGHT: dict[str, Array] = {"sx": np.full(8, 0.02, np.float32), "zx": np.full(8, 128, np.uint8)}


@pytest.mark.parametrize(
    ("old", "new", "weights", "reason"),
    [
        ("", "", {"wq": ints(8, 4).astype(np.uint8)}, "weight is not int8 with constant scales"),
        ("axis = 1>(wq", "axis = 0>(wq", {"sw": np.ones(8, np.float32)}, "output channels"),
        ("", "", {"zx": np.array(0, np.int8)}, "activation is not uint8"),
        ("Linear(x", "Linear<axis = -1>(x", EIGHT, "a scale per channel"),
        ("", "", EIGHT, "a scale per channel"),  # the axis is 1 where nothing is said
    ],
)
def test_refuses_what_has_no_fast_kernel(old: str, new: str, weights: Any, reason: str) -> None:
    graph = linear("y = MatMul(xd, wd)", *ROWS, QUANTIZED.replace(old, new), **weights)
    assert_refused(graph, LowerLinears(), reason)


def test_refuses_a_weight_of_rank_3() -> None:
    prefix = QUANTIZED.replace("axis = 1", "axis = 2")
    graph = linear("y = MatMul(xd, wd)", prefix=prefix, wq=ints(1, 8, 4))
    assert_refused(graph, LowerLinears(), "the weight is not a constant matrix")


def test_refuses_a_computed_weight() -> None:
    prefix = QUANTIZED.replace("(wq, sw)", "(wn, sw)").replace("wd =", "wn = Identity(wq) wd =")
    assert_refused(linear("y = MatMul(xd, wd)", prefix=prefix), LowerLinears(), "constant matrix")


@pytest.mark.parametrize("attribute", ["transA = 1", "alpha = 0.5", "beta = 2.0"])
def test_refuses_a_gemm_that_is_no_plain_product(attribute: str) -> None:
    square = ("float[8,8] x", "float[8,4] y")
    graph = linear(f"y = Gemm<{attribute}>(xd, wd, b)", *square)
    assert_refused(graph, LowerLinears(), "Gemm with transA, alpha or beta")


@pytest.mark.parametrize("body", ["y = MatMul(x, wd)", "n = Neg(wd) y = MatMul(xd, n)"])
def test_products_with_a_float_operand_are_no_refusal(body: str) -> None:
    graph = linear(body)
    ctx = run_pass(graph, LowerLinears())
    assert not ctx.skips
    check(graph, "CHECK: %y = MatMul(")
