"""Dequantized weights become MatMulNBits with 8 bits and one scale a block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.lower_weight_only import LowerWeightOnly
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

SCALES = np.array([1, 2, 3, 0.5], np.float32) / 127
WEIGHT = "w = DequantizeLinear<axis = 1>(wq, s) "


def ints(*shape: int) -> Array:
    """Weights that use the whole range of symmetric int8."""
    return np.random.default_rng(0).integers(-127, 128, shape, np.int8)


def linear(
    body: str, x: str = "float[B,S,40] x", out: str = "float[B,S,4] y", **changed: Array
) -> Graph:
    weights: dict[str, Array] = {"wq": ints(40, 4), "s": SCALES, "b": normal(4), **changed}
    return parse(f"g ({x}, bool c) => ({out}) {{ {body} }}", **weights)


ROWS = ("float[N,40] x", "float[N,4] y")


def error(weight: Array) -> float:
    """Largest error: the runtime rounds |x| <= 5 to 127 steps a block, sums are float.

    |x' - x| <= 5 / 127 / 2 for each of the K values, times |w|; then K roundings of 2^-24.
    """
    rows = np.abs(weight * SCALES).sum(axis=0).max()
    return float(5 / 127 / 2 * rows + weight.shape[0] * 2.0**-24 * 5 * rows)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_product(block: int) -> None:
    """K = 40 is no multiple of any block: the rest is padded with zeros, stored as 128.

    A block of 64 holds a whole row: larger ones would be padding.
    """
    graph = linear(WEIGHT + "y = MatMul(x, w)")
    ctx = context(mode="weight-only")
    ctx.origins.update({"wq": ("w", 40.0), "s": ("w", None)})
    differential(graph, LowerWeightOnly(block=block), atol=error(ints(40, 4)), ctx=ctx)
    block = min(block, 64)
    count = -(-40 // block)
    check(
        graph,
        f"""
        CHECK: graph g
        CHECK-NEXT: %y = com.microsoft.MatMulNBits(%x, @wq/blocks:u8[4,{count},{block}]
        CHECK-SAME: , @s/blocks:f32[{4 * count}]
        CHECK-SAME: {{K=40, N=4, accuracy_level=4, bits=8, block_size={block}}}
        """,
    )
    constants = graph.constants()
    packed = array(constants["wq/blocks"]).reshape(4, -1)
    np.testing.assert_array_equal(packed[:, :40].astype(int) - 128, ints(40, 4).T)
    assert (packed[:, 40:] == 128).all()
    np.testing.assert_array_equal(array(constants["s/blocks"]), np.repeat(SCALES, count))
    assert ctx.origins["wq/blocks"] == ("w", 40.0)
    assert ctx.origins["s/blocks"] == ("w", None)


def test_a_zero_point_of_zeros_is_none() -> None:
    body = WEIGHT.replace("(wq, s)", "(wq, s, z)") + "y = MatMul(x, w)"
    differential(linear(body, z=np.zeros(4, np.int8)), LowerWeightOnly(), atol=error(ints(40, 4)))


def test_a_bias_stays_a_sum_which_the_runtime_fuses() -> None:
    graph = linear(WEIGHT + "m = MatMul(x, w) y = Add(m, b)")
    differential(graph, LowerWeightOnly(), atol=error(ints(40, 4)))
    check(graph, "CHECK: %y = Add({{%[^ ]+}}, @b:f32[4]")
    assert optimized_ops(serialize(graph)) == {"com.microsoft.MatMulNBits": 1}


@pytest.mark.parametrize("shape", [(4,), (1,), (1, 4)])
def test_gemm(shape: tuple[int, ...]) -> None:
    """A Gemm may be a graph output: its name then belongs to the sum."""
    graph = linear(WEIGHT + "y = Gemm(x, w, b)", *ROWS, b=normal(*shape))
    differential(graph, LowerWeightOnly(), atol=error(ints(40, 4)))
    check(
        graph,
        """
        CHECK: [[M:%[^ ]+]] = com.microsoft.MatMulNBits(%x, @wq/blocks:u8[4,1,64]
        CHECK-NEXT: %y = Add([[M]], @b
        """,
    )


def test_gemm_with_an_omitted_bias() -> None:
    graph = linear(WEIGHT + "y = Gemm(x, w, )", *ROWS)
    differential(graph, LowerWeightOnly(), atol=error(ints(40, 4)))
    check(graph, "CHECK: %y = com.microsoft.MatMulNBits(%x")


def test_gemm_with_a_transposed_weight() -> None:
    body = "w = DequantizeLinear<axis = 0>(wq, s) y = Gemm<transB = 1>(x, w, b)"
    graph = linear(body, *ROWS, wq=ints(4, 40))
    differential(graph, LowerWeightOnly(), atol=error(ints(4, 40).T))
    check(graph, "CHECK: MatMulNBits(%x, @wq/blocks:u8[4,1,64]")


def test_a_weight_that_others_read_stays_dequantized_for_them() -> None:
    """Another reader, a subgraph, and a graph output in the middle of the product and its sum."""
    branches = """z = If (c) <
        then_branch = yes () => (float[40,4] p) { p = Neg(w) },
        else_branch = no () => (float[40,4] q) { q = Abs(w) }
    >"""
    graph = linear(
        WEIGHT + f"m = MatMul(x, w) y = Add(m, b) t = Transpose(w) {branches}",
        out="float[B,S,4] y, float[B,S,4] m, float[4,40] t, float[40,4] z",
    )
    feeds = [{"c": np.array(c), "x": np.clip(normal(1, 3, 40), -5, 5)} for c in (True, False)]
    differential(graph, LowerWeightOnly(), atol=error(ints(40, 4)), feeds=feeds)
    check(
        graph,
        """
        CHECK-DAG: %m = com.microsoft.MatMulNBits(%x, @wq/blocks
        CHECK-DAG: %y = Add(%m, @b
        CHECK-DAG: %t = Transpose(%w)
        """,
    )


@pytest.mark.parametrize(
    ("old", "new", "weights", "reason"),
    [
        ("", "", {"wq": ints(40, 4).astype(np.uint8)}, "the weight is not symmetric int8"),
        ("(wq, s)", "(wq, s, z)", {"z": np.ones(4, np.int8)}, "the weight is not symmetric int8"),
        ("axis = 1", "axis = 0", {"s": np.ones(40, np.float32)}, "not along the output channels"),
        ("axis = 1", "axis = 0", {"wq": ints(4, 4)}, "not along the output channels"),
        ("<axis = 1>", "", {"s": np.array(0.1, np.float32)}, "not along the output channels"),
        ("", "", {"s": np.array([0.1], np.float32)}, "not along the output channels"),
        ("Gemm", "Gemm<alpha = 0.5>", {}, "Gemm with transA, alpha or beta"),
        ("Gemm", "Gemm<beta = 0.5>", {}, "Gemm with transA, alpha or beta"),
        ("Gemm", "Gemm<transA = 1>", {}, "Gemm with transA, alpha or beta"),
    ],
)
def test_refuses_other_weights(old: str, new: str, weights: Any, reason: str) -> None:
    body = (WEIGHT + "y = Gemm(x, w, b)").replace(old, new)
    square = ("float[40,40] x", "float[40,4] y")
    assert_refused(linear(body, *square, **weights), LowerWeightOnly(), reason)


@pytest.mark.parametrize("change", ["Identity(wq)", "Neg(wq)"])
def test_refuses_a_computed_weight(change: str) -> None:
    body = f"k = {change} w = DequantizeLinear<axis = 1>(k, s) y = MatMul(x, w)"
    assert_refused(linear(body), LowerWeightOnly(), "the weight is not a constant matrix")


def test_refuses_computed_scales() -> None:
    body = "k = Neg(s) w = DequantizeLinear<axis = 1>(wq, k) y = MatMul(x, w)"
    assert_refused(linear(body), LowerWeightOnly(), "not along the output channels")


def test_refuses_a_weight_of_rank_3() -> None:
    body = "w = DequantizeLinear<axis = 2>(wq, s) y = MatMul(x, w)"
    graph = linear(body, wq=ints(1, 40, 4))
    assert_refused(graph, LowerWeightOnly(), "the weight is not a constant matrix")


def test_float_weights_are_no_refusal() -> None:
    graph = linear("w = Cast<to = 1>(wq) y = MatMul(x, w)")
    ctx = run_pass(graph, LowerWeightOnly())
    assert not ctx.skips


def test_blocks_are_powers_of_two() -> None:
    with pytest.raises(ValueError, match="block is 48, expected 16, 32, 64, 128 or 256"):
        LowerWeightOnly(block=48)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_four_bits_have_a_scale_for_each_block(block: int) -> None:
    """A step is an eighth of the block's largest value; beyond the last, values are a step off."""
    graph = linear(WEIGHT + "y = MatMul(x, w)")
    ctx = context(mode="weight-only")
    ctx.origins.update({"wq": ("w", 40.0), "s": ("w", None)})
    real = ints(40, 4) * SCALES
    steps = np.abs(real).max(axis=0) / 8
    atol = error(ints(40, 4)) + float(5 * 40 * steps.max())
    differential(graph, LowerWeightOnly(bits=4, block=block), atol=atol, ctx=ctx)
    count = -(-40 // block)
    check(graph, f"CHECK: MatMulNBits(%x, @wq/blocks:u8[4,{count},{block // 2}]\nCHECK: bits=4")
    constants = graph.constants()
    packed, scales = (array(constants[n]) for n in ("wq/blocks", "s/blocks"))
    stored = np.stack([packed & 15, packed >> 4], -1).reshape(4, count, block).astype(int) - 8
    unpacked = (stored * scales.reshape(4, count, 1)).reshape(4, -1)
    assert (np.abs(unpacked[:, :40].T - real) <= steps + 1e-6).all()
    assert not unpacked[:, 40:].any()
    origin, noise = ctx.origins["wq/blocks"]
    assert origin == "w" and noise is not None and 15 < noise < 30


def test_a_block_of_zeros_stays_zero() -> None:
    graph = linear(WEIGHT + "y = MatMul(x, w)", wq=np.zeros((40, 4), np.int8))
    # The runtime subtracts 8 times the sum of 40 values up to 5 from what it sums itself.
    differential(graph, LowerWeightOnly(bits=4), atol=40 * 5 * 8 * 2.0**-24)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 2}, "bits is 2, expected 4 or 8"),
        ({"accuracy": 5}, "accuracy is 5, expected 0 to"),
    ],
)
def test_options_are_checked(options: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LowerWeightOnly(**options)


def test_without_an_accuracy_level_activations_stay_float() -> None:
    """Float sums of 40 products of values up to 5 x 3, so no more than rounding is lost."""
    graph = linear(WEIGHT + "y = MatMul(x, w)")
    differential(graph, LowerWeightOnly(accuracy=0), atol=40 * 40 * 15 * 2.0**-24)
    check(graph, "CHECK: MatMulNBits(\nCHECK-NOT: accuracy_level")
