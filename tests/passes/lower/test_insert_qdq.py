"""The plan becomes nodes: one quantizer a tensor, read by all its planned uses."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.planning import Context, Decision, Use
from qcompile.quant import Array, QSpec, Range, worst_sums
from qcompile.quant.weight_rounding import pairs
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    filecheck,
    normal,
    outputs,
    parse,
    plan_text,
    run_pass,
)

LOW, HIGH = -3.0, 3.0
SCALE = (HIGH - LOW) / 255
QKV = """g (float[B,S,8] x) => (float[B,S,4] y) {
    a = MatMul(x, q)
    b = MatMul(x, k)
    c = MatMul(x, v)
    d = Add(a, b)
    y = Add(d, c)
}"""
ONE = "g (float[B,S,8] x) => (float[B,S,4] y) { y = MatMul(x, w) }"


def planned(graph: Graph, mode: str = "static", *ranged: str) -> Context:
    """A plan of the cpu target, with the range [LOW, HIGH] for the tensors named."""
    ctx = run_pass(graph, PlanOperands(), ctx=context(mode=mode))
    for name in ranged:
        ctx.ranges.set(name, Range(np.array(LOW), np.array(HIGH)))
    return ctx


def product_error(weight: Array, step: float = SCALE) -> float:
    """Largest error of x @ weight with |x| <= 3, x in steps of ``step`` and int8 weights.

    |x'w' - xw| <= |x' - x| |w| + |x'| |w' - w|, each value off by half a step, summed over K.
    """
    column = np.abs(weight).max(axis=0)
    rounding = column / 127 / 2
    error = step / 2 * np.abs(weight).sum(axis=0) + weight.shape[0] * (HIGH + step) * rounding
    return float(error.max())


FEEDS = [{"x": np.clip(normal(b, s, 8, seed=b + s), LOW, HIGH)} for b, s in ((1, 1), (2, 5))]


def test_query_key_and_value_read_one_quantized_input() -> None:
    weights = {name: normal(8, 4, seed=i) for i, name in enumerate("qkv")}
    graph = parse(QKV, **weights)
    atol = sum(product_error(w) for w in weights.values())
    differential(graph, InsertQdq(), atol=atol, feeds=FEEDS, ctx=planned(graph, "static", "x"))
    check(
        graph,
        """
        CHECK: %q/dequantized = DequantizeLinear(@q/int8:i8[8,4]{{[^ ]+}}, @q/scale:f32[4]
        CHECK-NEXT: %x/quantized = QuantizeLinear(%x, @x/scale:[[S:[^ ]+]], @x/zero_point:[[Z:.+]])
        CHECK-NEXT: %x/dequantized = DequantizeLinear(%x/quantized, {{.*}}:[[S]], {{.*}}:[[Z]])
        CHECK-NEXT: %a = MatMul(%x/dequantized, %q/dequantized)
        CHECK: %b = MatMul(%x/dequantized, %k/dequantized)
        CHECK: %c = MatMul(%x/dequantized, %v/dequantized)
        """,
    )


def test_scale_and_zero_point_are_those_of_the_range() -> None:
    """[-3, 3] in 255 steps; zero point round(3 / scale) = 127.5, to even."""
    graph = parse(ONE, w=normal(8, 4))
    ctx = run_pass(graph, InsertQdq(), ctx=planned(graph, "static", "x"))
    constants = graph.constants()
    assert array(constants["x/scale"]) == np.float32(6 / 255)
    assert array(constants["x/zero_point"]) == np.uint8(128)
    peaks, pair_sums = (
        np.abs(normal(8, 4)).max(axis=0),
        worst_sums(*pairs(normal(8, 4))).max(axis=0),
    )
    np.testing.assert_array_equal(
        array(constants["w/scale"]),
        np.maximum(peaks / np.float32(127), pair_sums / np.float32(127.5)),
    )
    origin, noise = ctx.origins["w/int8"]
    assert origin == "w"
    assert noise is not None
    assert noise > 35  # dB: uniform noise of a step max/127 on values of about max/2.5
    assert ctx.origins["w/scale"] == ("w", None)


@pytest.mark.parametrize("feed", FEEDS, ids=["one token", "batch"])
def test_dynamic_mode_measures_each_feed(feed: dict[str, Array]) -> None:
    """The range of a feed is within [LOW, HIGH], so that the step is at most SCALE."""
    graph = parse(ONE, w=normal(8, 4))
    atol = product_error(normal(8, 4))
    differential(graph, InsertQdq(), atol=atol, feeds=[feed], ctx=planned(graph, "dynamic"))
    check(
        graph,
        """
        CHECK: %x/quantized, %x/scale, %x/zero_point = DynamicQuantizeLinear(%x)
        CHECK-NEXT: %x/dequantized = DequantizeLinear(%x/quantized, %x/scale, %x/zero_point)
        CHECK-NEXT: %y = MatMul(%x/dequantized, %w/dequantized)
        """,
    )


def test_weight_only_mode_leaves_the_data() -> None:
    """Only the weights err: by half of max/127 each."""
    graph = parse(ONE, w=normal(8, 4))
    atol = product_error(normal(8, 4), step=0)
    differential(graph, InsertQdq(), atol=atol, feeds=FEEDS, ctx=planned(graph, "weight-only"))
    check(graph, "CHECK: %y = MatMul(%x, %w/dequantized)")


def test_a_shared_weight_is_quantized_once() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = MatMul(x, w)
            y = MatMul(a, w)
        }""",
        w=normal(4, 4),
    )
    run_pass(graph, InsertQdq(), ctx=planned(graph, "static", "x", "a"))
    check(
        graph,
        """
        CHECK: %w/dequantized = DequantizeLinear(@w/int8
        CHECK: %a = MatMul(%x/dequantized, %w/dequantized)
        CHECK-NOT: = DequantizeLinear(@
        CHECK: %y = MatMul(%a/dequantized, %w/dequantized)
        """,
    )


def test_a_weight_that_others_read_stays_float_for_them() -> None:
    """An elementwise reader, a subgraph, and a graph output in the middle."""
    graph = parse(
        """g (bool c, float[4,4] x) => (float[4,4] a, float[4,4] y) {
            a = MatMul(x, w)
            b = Mul(a, w)
            i = If (c) <
                then_branch = yes () => (float[4,4] p) { p = Add(w, x) },
                else_branch = no () => (float[4,4] q) { q = Neg(w) }
            >
            y = Add(b, i)
        }""",
        w=normal(4, 4),
    )
    feeds = [{"c": np.array(c), "x": np.clip(normal(4, 4), LOW, HIGH)} for c in (True, False)]
    atol = product_error(normal(4, 4)) * max(1, float(np.abs(normal(4, 4)).max()))
    differential(graph, InsertQdq(), atol=atol, feeds=feeds, ctx=planned(graph, "static", "x"))
    check(
        graph,
        """
        CHECK: %a = MatMul(%x/dequantized, %w/dequantized)
        CHECK: %b = Mul(%a, @w:f32[4,4]
        """,
    )


def test_an_embedding_table_by_row() -> None:
    """Rows err by half of their own max/127."""
    table = normal(65536, 4)
    graph = parse("g (int64[N] i) => (float[N,4] y) { y = Gather(t, i) }", t=table)
    feed = {"i": np.array([0, 7, -1])}
    atol = float(np.abs(table[feed["i"]]).max()) / 127 / 2 * 1.001
    differential(graph, InsertQdq(), atol=atol, feeds=[feed], ctx=planned(graph))
    check(
        graph,
        """
        CHECK: %t/dequantized = DequantizeLinear(@t/int8:i8[65536,4]{{.*}} {axis=0}
        CHECK-NEXT: %y = Gather(%t/dequantized, %i)
        """,
    )


def test_scales_per_channel_of_an_activation() -> None:
    graph = parse(ONE, w=normal(8, 4))
    ctx = context()
    spec = QSpec("uint8", symmetric=False, granularity="channel", axis=-1)
    ctx.plan.decide(Decision("x", "activation", spec, "by hand", (Use("MatMul:y", 0),)))
    ctx.ranges.set("x", Range(np.full(8, LOW), np.full(8, HIGH), axis=-1))
    atol = SCALE / 2 * float(np.abs(normal(8, 4)).sum(axis=0).max()) + 1e-5
    differential(graph, InsertQdq(), atol=atol, feeds=FEEDS, ctx=ctx)
    check(
        graph,
        """
        CHECK: QuantizeLinear(%x, @x/scale:f32[8]{{.*}}, @x/zero_point:u8[8]{{.*}}) {axis=-1}
        CHECK: DequantizeLinear(%x/quantized, {{.*}}) {axis=-1}
        """,
    )


def test_refuses_data_without_a_range_and_its_weight_with_it() -> None:
    graph = parse(ONE, w=normal(8, 4))
    ctx = planned(graph)
    ctx.ranges.missing["x"] = "no finite value was seen"
    assert_refused(graph, InsertQdq(), "no finite value was seen", ctx)
    filecheck(
        plan_text(ctx),
        """
        CHECK: weight w: float at MatMul:y.1 because no finite value was seen
        CHECK-NEXT: activation x: float at MatMul:y.0 because no finite value was seen
        """,
    )


def test_refuses_a_range_that_was_never_asked_for() -> None:
    graph = parse(ONE, w=normal(8, 4))
    assert_refused(graph, InsertQdq(), "no range was calibrated for it", planned(graph))


def test_a_missing_range_concerns_only_its_own_operators() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = MatMul(x, w)
            y = MatMul(a, v)
        }""",
        w=normal(4, 4),
        v=normal(4, 4),
    )
    run_pass(graph, InsertQdq(), ctx=planned(graph, "static", "x"))
    check(
        graph,
        """
        CHECK: %a = MatMul(%x/dequantized, %w/dequantized)
        CHECK: %y = MatMul(%a, @v:f32[4,4]
        """,
    )


def test_a_missing_range_leaves_a_shared_weight_to_its_other_reader() -> None:
    """And no quantizer is left over at the node that stays float."""
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = MatMul(x, w)
            y = MatMul(a, w)
        }""",
        w=normal(4, 4),
    )
    ctx = run_pass(graph, InsertQdq(), ctx=planned(graph, "static", "x"))
    filecheck(plan_text(ctx), "CHECK-DAG: weight w: int8\nCHECK-DAG: weight w: float at MatMul:y.1")
    check(graph, "CHECK: %a = MatMul(%x/dequantized, %w/dequantized)\nCHECK: MatMul(%a, @w:f32")


def test_a_plan_is_carried_out_once() -> None:
    graph = parse(ONE, w=normal(8, 4))
    ctx = run_pass(graph, InsertQdq(), ctx=planned(graph, "static", "x"))
    count = len(graph.nodes)
    run_pass(graph, InsertQdq(), ctx=ctx)
    assert len(graph.nodes) == count


def test_an_empty_plan_changes_nothing() -> None:
    graph = parse(ONE, w=normal(8, 4))
    run_pass(graph, InsertQdq(), ctx=context())
    check(graph, "CHECK: %y = MatMul(%x, @w:f32[8,4]")


def test_data_of_seven_bits_is_clipped() -> None:
    """QuantizeLinear saturates at 8 bits; what lies outside of the range must not reach 65."""
    graph = parse("g (float[B,4] x) => (float[B,4] y) { y = Neg(x) }")
    spec = QSpec("int8", symmetric=False, reduced=True)
    ctx = context()
    ctx.plan.decide(Decision("x", "activation", spec, "by hand", (Use(graph.nodes[0].name, 0),)))
    ctx.ranges.set("x", Range(np.array(-1.0), np.array(3.0)))
    step = 4 / 128
    inside = {"x": np.linspace(-1, 3, 12, dtype=np.float32).reshape(3, 4)}
    differential(graph, InsertQdq(), atol=step / 2 + 1e-6, feeds=[inside], ctx=ctx)
    check(
        graph,
        """
        CHECK: %x/quantized = QuantizeLinear(%x, @x/scale{{.*}}, @x/zero_point:i8[]=-32)
        CHECK-NEXT: %x/quantized/clipped = Clip(%x/quantized, {{.*}}=-64, {{.*}}=64)
        CHECK-NEXT: %x/dequantized = DequantizeLinear(%x/quantized/clipped, @x/scale
        """,
    )
    beyond = outputs(graph, {"x": np.array([[-9.0, -1, 3, 9]], np.float32)})["y"]
    np.testing.assert_allclose(beyond, [[1, 1, -3, -3]], atol=step / 2 + 1e-6)
