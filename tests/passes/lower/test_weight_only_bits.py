"""Weights of few bits become MatMulNBits with 4 or 2 bits and exactly the values of the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.passes.lower.lower_weight_only import LowerWeightOnly
from qcompile.planning import Context, Decision, Use
from qcompile.quant import Array, QSpec
from qcompile.rewriting.testing import check, context, differential, normal, parse, run_pass
from qcompile.targets.target import OpRule

FLOAT = LowerWeightOnly(accuracy=0)
OUTPUTS = 5
SCALE = np.array([1, 2, 3, 0.5, 0.1], np.float32) / 1024
MULTIPLIERS = np.array([1, -3, 5, 7, -8], np.int8)


def weight(bits: int, inputs: int, block: int | None = None) -> Array:
    """int8 (inputs, outputs): codes, in blocks times multipliers of both signs."""
    low = -(1 << bits - 1)
    codes = np.random.default_rng(bits).integers(low, -low, (inputs, OUTPUTS), np.int8)
    if block is None:
        return codes
    times = np.stack([np.roll(MULTIPLIERS, i) for i in range(-(-inputs // block))])
    found: Array = codes * np.repeat(times, block, axis=0)[:inputs]
    return found


def linear(values: Array, body: str = "y = MatMul(x, w)") -> Graph:
    """x[B,S,K] by a dequantized weight."""
    text = f"""g (float[B,S,{len(values)}] x) => (float[B,S,{OUTPUTS}] y) {{
        w = DequantizeLinear<axis = 1>(wq, s) {body} }}"""
    return parse(text, wq=values, s=SCALE, b=normal(OUTPUTS))


def few_bits() -> Context:
    """A context whose plan asks for few bits."""
    ctx = context(mode="weight-only")
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4)
    ctx.plan.decide(Decision("w", "weight", spec, "asked for", (Use("MatMul:y", 1),)))
    return ctx


def compare(graph: Graph, item: LowerWeightOnly = FLOAT) -> list[str]:
    """Against the float model of the same integers; returns what the pass refused.

    Sums of up to 256 products, |x| < 5 and |w| < 64 · 3 / 1024, in another order: 2^-24 of about 4,
    the size of a sum, for each addition, of random signs.
    """
    ctx = differential(graph, item, atol=1e-5, ctx=few_bits())
    return [s.reason for s in ctx.skips]


@pytest.mark.parametrize("inputs", [256, 250, 129])
@pytest.mark.parametrize(
    ("bits", "block"),
    [(4, 16), (4, 32), (4, 64), (4, 128), (4, None), (2, 32), (2, 64), (2, 128), (2, None)],
)
def test_the_product_is_that_of_the_same_integers(
    bits: int, block: int | None, inputs: int
) -> None:
    """All blocks, and rows whose last block is not full."""
    graph = linear(weight(bits, inputs, block))
    assert compare(graph) == []
    written = block or 128
    count = -(-inputs // written)
    check(
        graph,
        f"""
        CHECK: %y = com.microsoft.MatMulNBits(%x, @wq/blocks:u8[5,{count},{written * bits // 8}]
        CHECK-SAME: , @s/blocks:f32[{5 * count}]
        CHECK-SAME: {{K={inputs}, N=5, bits={bits}, block_size={written}}}
        """,
    )


@pytest.mark.parametrize("inputs", [1, 7, 20, 40])
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_shorter_than_a_block(bits: int, inputs: int) -> None:
    values = weight(bits, inputs)
    values[0] = -(1 << bits - 1)
    assert compare(linear(values)) == []


@pytest.mark.parametrize("bits", [2, 4])
def test_signs_are_in_the_scales(bits: int) -> None:
    graph = linear(weight(bits, 128, 32))
    compare(graph)
    scales = array(graph.constants()["s/blocks"]).reshape(OUTPUTS, 4)
    times = np.stack([np.roll(MULTIPLIERS, i) for i in range(4)]).T
    np.testing.assert_array_equal(np.abs(scales), np.abs(SCALE[:, None] * times))
    assert (scales < 0).any()


@pytest.mark.parametrize("bits", [2, 4])
def test_a_bias_and_a_transposed_weight(bits: int) -> None:
    values = weight(bits, 64, 32)
    text = f"""g (float[N,64] x) => (float[N,{OUTPUTS}] y) {{
        w = DequantizeLinear<axis = 0>(wq, s) y = Gemm<transB = 1>(x, w, b) }}"""
    graph = parse(text, wq=np.ascontiguousarray(values.T), s=SCALE, b=normal(OUTPUTS))
    assert compare(graph) == []
    check(
        graph,
        f"""
        CHECK: [[M:%[^ ]+]] = com.microsoft.MatMulNBits(%x, @wq/blocks:u8[5,2,{4 * bits}]
        CHECK-NEXT: %y = Add([[M]], @b
        """,
    )


@pytest.mark.parametrize(
    ("values", "written", "reason"),
    [
        (weight(2, 128, 16), "bits=4, block_size=16", "2 bits in blocks of 16, and are stored in"),
        (weight(3, 128, 32), "bits=4, block_size=32", "3 bits in blocks of 32, and are stored in"),
        (weight(5, 128), "bits=8, block_size=128", "5 bits, and are stored in 8: the operator"),
    ],
)
def test_codes_that_the_operator_does_not_take_get_more_bits(
    values: Array, written: str, reason: str
) -> None:
    graph = linear(values)
    (found,) = compare(graph)
    assert reason in found
    check(graph, f"CHECK: MatMulNBits(\nCHECK-SAME: {written}")


def test_a_runtime_may_read_no_codes_of_2_bits() -> None:
    graph = linear(weight(2, 128, 32))
    (reason,) = compare(graph, replace(FLOAT, fewest=4))
    assert reason.endswith("2 bits in blocks of 32, and are stored in 4: the operator takes 4, 8")
    check(graph, "CHECK: MatMulNBits(\nCHECK-SAME: bits=4, block_size=32")


def test_blocks_are_no_larger_than_asked_for() -> None:
    """A smaller block quantizes the data more finely, where the operator does that."""
    graph = linear(weight(4, 128, 64))
    assert compare(graph, replace(FLOAT, block=32)) == []
    check(graph, "CHECK: MatMulNBits(\nCHECK-SAME: bits=4, block_size=32")


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_again_leaves_weights_of_few_bits_as_they_are(bits: int) -> None:
    graph = linear(weight(bits, 128, 32))
    assert compare(graph, replace(FLOAT, bits=4)) == []
    check(graph, f"CHECK: MatMulNBits(\nCHECK-SAME: bits={bits}, block_size=32")


@pytest.mark.parametrize("bits", [2, 4])
def test_level_4_rounds_the_data(bits: int) -> None:
    """Steps of 1/127 of a block's largest value, |x| < 5, half a step off for each of 64 values."""
    values = weight(bits, 64, 32)
    bound = float(5 / 127 / 2 * np.abs(values * SCALE).sum(axis=0).max())
    graph = linear(values)
    ctx = differential(graph, LowerWeightOnly(), atol=bound, ctx=few_bits())
    check(graph, "CHECK: MatMulNBits(\nCHECK-SAME: accuracy_level=4")
    assert "'weight-only-data: float' keeps it float" in ctx.remarks["weight-only-data"]


def test_the_report_says_where_another_mode_is_faster() -> None:
    ctx = run_pass(linear(weight(4, 64)), FLOAT)
    assert "one or two rows" in ctx.remarks["weight-only-speed"]
    assert "weight-only-data" not in ctx.remarks


@pytest.mark.parametrize("target", ["cuda", "float rules"])
def test_no_other_mode_is_faster_without_integer_kernels(target: str) -> None:
    ctx = context(mode="weight-only")
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1)
    rules = () if target == "cuda" else (OpRule("MatMul", weight=spec),)
    ctx.target = replace(ctx.target, rules=rules)
    run_pass(linear(weight(4, 64)), FLOAT, ctx=ctx)
    assert "weight-only-speed" not in ctx.remarks


def test_values_that_happen_to_need_few_bits_stay_bytes() -> None:
    """Where the plan asks for 8 bits everywhere, files stay as they were."""
    graph = linear(weight(4, 128))
    differential(graph, FLOAT, atol=1e-5)
    check(graph, "CHECK: MatMulNBits(\nCHECK-SAME: bits=8")


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="fewest is 3, expected 2, 4 or 8"):
        LowerWeightOnly(fewest=3)
