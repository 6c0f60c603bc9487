"""One quantizer for each tensor between linears, on targets that quantize everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_interior import PlanInterior
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.planning import Context
from qcompile.planning.context import Precision
from qcompile.quant import Range
from qcompile.rewriting.registry import target
from qcompile.rewriting.testing import (
    check,
    context,
    differential,
    filecheck,
    normal,
    parse,
    plan_text,
    run_pass,
)

MADE = "because quantized where it is made"


def plan(graph: Graph, directives: str, ctx: Context | None = None) -> Context:
    """Plan, which edits nothing (so answers are bit-equal), and check the decisions."""
    before = dump(graph)
    ctx = run_pass(graph, PlanOperands(), PlanInterior(), ctx=ctx or context("qdq"))
    assert dump(graph) == before
    filecheck(plan_text(ctx), directives)
    return ctx


def test_each_tensor_is_quantized_where_it_is_made_for_all_its_readers() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y) {
            m = MatMul(x, w)
            r = Relu(m)
            a = Add(r, x)
            b = Mul(a, s)
            y = Softmax(b)
        }""",
        w=normal(8, 8),
        s=normal(8),
    )
    ctx = plan(
        graph,
        f"""
        CHECK: weight w: int8:sym:channel[1]:pairs at MatMul:m.1
        CHECK-NEXT: activation a: uint8:asym:tensor at Mul:b.0 {MADE}
        CHECK-NEXT: activation b: uint8:asym:tensor at Softmax:y.0 {MADE}
        CHECK-NEXT: activation m: uint8:asym:tensor at Relu:r.0 {MADE}
        CHECK-NEXT: activation r: uint8:asym:tensor at Add:a.0 {MADE}
        CHECK-NEXT: activation x: uint8:asym:tensor at MatMul:m.0, Add:a.1 {MADE}
        CHECK-NEXT: activation y: float at {{{{.*}}}}because graph output
        """,
    )
    assert [r.tensor for r in ctx.requests] == ["a", "b", "m", "r", "x"]


def test_only_products_await_a_bias_and_only_in_a_sum() -> None:
    """A constant is added to r, and multiplied with m: both are quantized where they are made."""
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y) {
            m = MatMul(x, w)
            a = Mul(m, b)
            r = Relu(a)
            s = Add(r, b)
            y = Add(s, s)
        }""",
        w=normal(8, 8),
        b=normal(8),
    )
    plan(
        graph,
        f"""
        CHECK: activation m: uint8:asym:tensor at Mul:a.0 {MADE}
        CHECK: activation r: uint8:asym:tensor at Add:s.0 {MADE}
        CHECK: activation s: uint8:asym:tensor at Add:y.0, Add:y.1 {MADE}
        """,
    )


def test_products_that_await_a_bias_stay_float_and_the_sum_is_quantized() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y) {
            m = MatMul(x, w)
            a = Add(b, m)
            y = Relu(a)
        }""",
        w=normal(8, 8),
        b=normal(8),
    )
    plan(
        graph,
        f"""
        CHECK: activation a: uint8:asym:tensor at Relu:y.0 {MADE}
        CHECK: activation m: float at Add:a.1 because the bias is added first
        """,
    )


def test_divisors_stay_float() -> None:
    """x is quantized to zero where it is small; what it divides is finite all the same."""
    graph = parse("g (float[N,8] x, float[N,8] z) => (float[N,8] y) { y = Div(z, x) }")
    plan(
        graph,
        f"""
        CHECK: activation x: float at Div:y.1 because it is a divisor
        CHECK: activation z: uint8:asym:tensor at Div:y.0 {MADE}
        """,
    )


SCORES = """
    t = Transpose<perm = [1, 0]>(x)
    s = MatMul(x, t)
    a = Add(s, bias)
    y = Softmax(a)
"""


def test_sums_with_a_mask_made_of_integers_stay_float() -> None:
    graph = parse(
        f"""g (float[N,8] x, int64[N] attention) => (float[N,N] y) {{
            f = Cast<to = 1>(attention) i = Sub(one, f) bias = Mul(i, low) {SCORES} }}""",
        one=np.array(1, np.float32),
        low=np.array(-3.4e38, np.float32),
    )
    ctx = plan(
        graph,
        """
        CHECK: activation a: float at Softmax:y.0 because a mask is added
        CHECK-NEXT: activation s: float at Add:a.0 because attention scores over an open length
        CHECK-NEXT: activation x: uint8:asym:tensor
        CHECK-NEXT: activation y:
        CHECK-NOT: activation
        """,
    )
    assert [r.tensor for r in ctx.requests] == ["x"]


def test_sums_with_a_constant_mask_stay_float() -> None:
    mask = np.triu(np.full((4, 4), -1e9, np.float32), 1)
    graph = parse(f"g (float[4,8] x) => (float[4,4] y) {{ {SCORES} }}", bias=mask)
    plan(graph, "CHECK: activation a: float at Softmax:y.0 because a mask is added")


RMS_NORM = """
    q = Pow(x, two)  m = ReduceMean<axes = [-1]>(q)  v = Add(m, eps)  r = Sqrt(v)  f = Div(one, r)
    n = Mul(x, f)  h = Mul(n, gamma)  y = Neg(h)
"""
SCALARS = {
    "two": np.array(2, np.float32),
    "eps": np.array(1e-6, np.float32),
    "one": np.array(1, np.float32),
}


def rms_norm() -> Graph:
    weights = {**SCALARS, "gamma": normal(8)}
    return parse(f"g (float[N,8] x) => (float[N,8] y) {{ {RMS_NORM} }}", **weights)


def test_statistics_of_a_norm_stay_float_as_in_one_operator() -> None:
    plan(
        rms_norm(),
        f"""
        CHECK: activation f: float at {{{{.*}}}}because it scales a whole row
        CHECK: activation m: float at Add:v.0 because it scales a whole row
        CHECK: activation n: uint8:asym:tensor at Mul:h.0 {MADE}
        CHECK: activation q: float at ReduceMean:m.0 because it scales a whole row
        CHECK: activation v: float at Sqrt:r.0 because it scales a whole row
        CHECK: activation x: uint8:asym:tensor at Pow:q.0, Mul:n.0 {MADE}
        """,
    )


def test_a_users_precision_decides_on_what_no_data_bounds() -> None:
    ctx = plan(rms_norm(), "CHECK: activation f: uint8", context("qdq", [("*", 8)]))
    assert [r.tensor for r in ctx.requests] == [*"fhmnqvx"]


@pytest.mark.parametrize("precision", [(), [("f", 8)]])
def test_rows_smaller_than_all_that_were_calibrated(precision: list[tuple[str, Precision]]) -> None:
    """Rows of size .2 after calibration with rows of size 1: x is off by half a step, 3/255, which
    is .06 of a row, times the largest gamma, 1.4; with n's own rounding that is below .15. An
    inverse norm of 5 that is clipped at 1.5 changes values of 1 by .7 and more."""
    graph, feed = rms_norm(), {"x": 0.2 * normal(5, 8, seed=1)}
    ctx = run_pass(graph, PlanOperands(), PlanInterior(), ctx=context("qdq", precision))
    wide, narrow = (Range(np.array(-e), np.array(e)) for e in (3.0, 1.5))
    ctx.ranges.found |= {"x": wide, "n": wide, "f": narrow}
    if not precision:
        differential(graph, InsertQdq(), atol=0.15, feeds=[feed], ctx=ctx)
        return
    with pytest.raises(AssertionError):
        differential(graph, InsertQdq(), atol=0.5, feeds=[feed], ctx=ctx)


def test_layout_operators_share_the_quantizer_of_what_they_move() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[2,N,4] y) {
            r = Relu(x)
            v = Reshape(r, heads)
            t = Transpose<perm = [1, 0, 2]>(v)
            m = MatMul(t, w)
            y = Softmax(m)
        }""",
        heads=np.array([0, 2, 4]),
        w=normal(4, 4),
    )
    plan(
        graph,
        f"""
        CHECK: activation m:
        CHECK-NEXT: activation r: uint8:asym:tensor at Reshape:v.0 {MADE}
        CHECK-NEXT: activation x:
        CHECK-NOT: activation t
        CHECK-NOT: activation v
        """,
    )


def test_an_output_in_the_middle_is_quantized_for_its_readers_alone() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y, float[N,8] r) {
            r = Relu(x)
            y = Softmax(r)
        }"""
    )
    ctx = plan(graph, f"CHECK: activation r: uint8:asym:tensor at Softmax:y.0 {MADE}")
    for name in ("x", "r"):
        ctx.ranges.set(name, Range(np.array(-4), np.array(4)))
    run_pass(graph, InsertQdq(), ctx=ctx)
    check(
        graph,
        """
        CHECK: -> (%y, %r)
        CHECK: %r = Relu(%x/dequantized)
        CHECK: %y = Softmax(%r/dequantized)
        """,
    )


def test_what_a_subgraph_reads_stays_float() -> None:
    """r itself, v behind a layout operator; s is read by nothing else."""
    graph = parse(
        """g (bool c, float[N,8] x) => (float[N,8] y) {
            r = Relu(x)
            s = Sigmoid(x)
            t = Tanh(x)
            v = Reshape(t, shape)
            i = If (c) <
                then_branch = yes () => (float[N,8] p) { p = Neg(r) },
                else_branch = no () => (float[N,8] q) { q = Add(s, v) }
            >
            a = Softmax(r)
            b = Softmax(v)
            y = Add(a, b)
        }""",
        shape=np.array([0, 8]),
    )
    plan(
        graph,
        """
        CHECK: activation a: uint8:asym:tensor at Add:y.0
        CHECK: activation r: float at Softmax:a.0 because a subgraph reads it
        CHECK: activation s: float
        CHECK: activation t: float at Reshape:v.0 because a subgraph reads it
        """,
    )


def test_what_is_kept_float_stays_so() -> None:
    graph = parse(
        "g (float[N,8] x) => (float[N,8] y) { m = MatMul(x, w) y = Relu(m) }", w=normal(8, 8)
    )
    plan(
        graph,
        """
        CHECK: weight w: float
        CHECK: activation x: float at MatMul:m.0 because kept float by pattern 'x'
        """,
        context("qdq", keep_float=("x",)),
    )


@pytest.mark.parametrize("pattern", ["r", "Relu:r", "Softmax:y"])
def test_a_tensor_is_kept_float_by_its_name_its_maker_or_a_reader(pattern: str) -> None:
    graph = parse("g (float[N,8] x) => (float[N,8] y) { r = Relu(x) y = Softmax(r) }")
    ctx = context("qdq", keep_float=(pattern,))
    why = f"because kept float by pattern '{pattern}'"
    plan(graph, f"CHECK: activation r: float at Softmax:y.0 {why}", ctx)


def test_opsets_without_scales_by_channel_are_left_alone() -> None:
    graph = parse("g (float[N,8] x) => (float[N,8] y) { r = Relu(x) y = Softmax(r) }", 12)
    ctx = run_pass(graph, PlanOperands(), PlanInterior(), ctx=context("qdq"))
    assert not ctx.plan.decisions
    assert [s.pass_name for s in ctx.skips] == ["plan-operands"]


def test_contrib_operators_count_as_what_they_compute() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y, float[N,8] z) {
            r = Relu(x)
            y = com.microsoft.Gelu(r)
            k = Neg(x)
            z = acme.Gelu(k)
        }"""
    )
    plan(
        graph,
        """
        CHECK-NOT: activation k
        CHECK: activation r: uint8:asym:tensor at Gelu:y.0
        """,
    )


@pytest.mark.parametrize(("name", "mode"), [("cpu", "static"), ("qdq", "weight-only")])
def test_other_targets_and_modes_plan_nothing_more(name: str, mode: str) -> None:
    graph = parse(
        "g (float[N,8] x) => (float[N,8] y) { m = MatMul(x, w) y = Relu(m) }", w=normal(8, 8)
    )
    ctx = run_pass(graph, PlanOperands(), ctx=context(name, mode=mode))
    before = plan_text(ctx)
    run_pass(graph, PlanInterior(), ctx=ctx)
    assert plan_text(ctx) == before


def test_the_target_asks_for_it_by_a_flag_not_by_its_name() -> None:
    ctx = context("qdq")
    ctx.target = replace(target("qdq"), quantize_interior=False)
    graph = parse("g (float[N,8] x) => (float[N,8] y) { y = Relu(x) }")
    run_pass(graph, PlanInterior(), ctx=ctx)
    assert not ctx.plan.decisions


@pytest.mark.parametrize("rows", [1, 5])
def test_the_planned_quantizers_cost_half_a_scale_each(rows: int) -> None:
    """x, |x|, x + |x| in [-4, 4], [0, 4], [0, 8] with 255 steps: 4/255 + 2/255 + the rest.

    Errors add up: 2 * s_x/2 (x is read twice, once through |.|), s_|x|/2, s_sum/2.
    """
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y) {
            r = Relu(x)
            a = Add(x, r)
            y = Relu(a)
        }"""
    )
    ctx = plan(graph, "CHECK: activation x: uint8:asym:tensor at Relu:r.0, Add:a.0")
    for name, low, high in (("x", -4, 4), ("r", 0, 4), ("a", -4, 8)):
        ctx.ranges.set(name, Range(np.array(low), np.array(high)))
    feed = {"x": np.clip(normal(rows, 8), -4, 4)}
    steps = 2 * 8 / 255 + 4 / 255 + 12 / 255
    differential(graph, InsertQdq(), atol=steps / 2 + 1e-6, feeds=[feed], ctx=ctx)
