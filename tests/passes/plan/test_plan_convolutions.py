"""Which convolutions are planned in integers, and why others are not."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.plan.plan_convolutions import PlanConvolutions
from qcompile.passes.plan.plan_interior import PlanInterior
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting.testing import context, filecheck, normal, parse, plan_text, run_pass


def network(body: str, out: str = "float[1,C,H,W] y", opset: int = 17, **changed: Array) -> Graph:
    weights: dict[str, Array] = {
        "w": normal(8, 8, 3, 3),
        "v": normal(8, 8, 3, 3, seed=1),
        "d": normal(8, 1, 3, 3, seed=2),
        "b": normal(8),
        **changed,
    }
    return parse(f"g (float[1,8,9,9] x) => ({out}) {{ {body} }}", opset, **weights)


def plan(graph: Graph, ctx: Context | None = None) -> Context:
    return run_pass(graph, PlanOperands(), PlanConvolutions(), ctx=ctx or context())


TWO = "c = Conv(x, w, b) r = Relu(c) e = Conv(r, v) y = Sigmoid(e)"


def test_data_weight_and_result_become_integers() -> None:
    ctx = plan(network(TWO))
    filecheck(
        plan_text(ctx),
        """
        CHECK: weight w: int8:sym:channel[0]:pairs at Conv:c.1 because QLinearConv
        CHECK-NEXT: activation x: uint8:asym:tensor at Conv:c.0
        CHECK-NEXT: activation r: uint8:asym:tensor at Conv:e.0
        CHECK-NEXT: weight v: int8:sym:channel[0]:pairs at Conv:e.1
        CHECK-NEXT: activation e: uint8:asym:tensor at Sigmoid:y.0
        CHECK-NOT: {{activation c|float}}
        """,
    )
    assert {r.tensor for r in ctx.requests} == {"x", "r", "e"}


def test_sums_pools_and_concats_between_integers_follow() -> None:
    ctx = plan(
        network(
            """c = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(c) e = Conv<pads = [1, 1, 1, 1]>(r, v)
            a = Add(e, r) s = Relu(a) p = MaxPool<kernel_shape = [2, 2]>(s)
            k = Concat<axis = 1>(p, p) y = Sigmoid(k)"""
        )
    )
    filecheck(
        plan_text(ctx),
        """
        CHECK: activation e: uint8:asym:tensor at Add:a.0
        CHECK: activation s: uint8:asym:tensor at MaxPool:p.0 because QLinearAdd
        CHECK-NEXT: activation p: uint8:asym:tensor at Concat:k.0, Concat:k.1 because picks
        CHECK-NEXT: activation k: uint8:asym:tensor at Sigmoid:y.0 because moves
        """,
    )
    assert ": float at" not in plan_text(ctx)


def test_a_sum_with_a_float_operand_stays_float() -> None:
    graph = network("c = Conv<pads = [1, 1, 1, 1]>(x, w) a = Add(c, x) y = Sigmoid(a)")
    assert "activation a:" not in plan_text(plan(graph))


def test_a_depthwise_convolution_is_integer_between_integers_alone() -> None:
    few = "with groups, or few multiplications per value, the float kernel is faster"
    ctx = plan(network("c = Conv<group = 8>(x, d) y = Sigmoid(c)"))
    assert [s.reason for s in ctx.skips] == [few]
    ctx = plan(network("c = Conv(x, w) e = Conv<group = 8>(c, d) y = Sigmoid(e)"))
    assert ctx.skips == []
    assert "weight d: int8:sym:channel[0] at" in plan_text(ctx)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (network("y = Conv(x, w)"), "its result is a graph output"),
        (
            network("c = Conv(x, w) y = Relu(c) z = Neg(y)", "float[1,C,H,W] y, float[1,C,H,W] z"),
            "its result is a graph output",
        ),
        (network("i = Neg(w) c = Conv(x, i) y = Sigmoid(c)"), "not a float32 constant"),
        (network("n = Neg(b) c = Conv(x, w, n) y = Sigmoid(c)"), "the bias is computed"),
        (
            network("c = Conv(x, w) y = Sigmoid(c)", w=np.full((8, 8, 3, 3), np.nan, np.float32)),
            "holds NaN or infinity",
        ),
    ],
)
def test_what_stays_float_has_a_reason(graph: Graph, reason: str) -> None:
    ctx = plan(graph)
    assert [reason in s.reason for s in ctx.skips] == [True]
    assert not any(ctx.plan.quantized())


@pytest.mark.parametrize("pattern", ["Conv:c", "c", "w", "r"])
def test_the_user_keeps_a_convolution_float_by_any_of_its_names(pattern: str) -> None:
    ctx = plan(network(TWO), context(precision=((pattern, "float"),)))
    assert "weight w: float at Conv:c.1 because kept float by precision" in plan_text(ctx)
    if pattern != "r":
        ctx = plan(network(TWO), context(keep_float=(pattern,)))
        assert f"weight w: float at Conv:c.1 because kept float by pattern {pattern!r}" in (
            plan_text(ctx)
        )


def test_dynamic_mode_says_why_not() -> None:
    ctx = plan(network(TWO), context(mode="dynamic"))
    assert "weight w: float at Conv:c.1 because int8 only in mode static" in plan_text(ctx)


def test_on_qdq_every_tensor_has_its_own_quantizer() -> None:
    """The result of a convolution is quantized after the activation that becomes part of it."""
    graph, ctx = network(TWO), context("qdq")
    run_pass(graph, PlanOperands(), PlanConvolutions(), PlanInterior(), ctx=ctx)
    quantized = {d.tensor for d in ctx.plan.quantized()}
    assert quantized == {"w", "v", "x", "r", "e"}
    filecheck(plan_text(ctx), "CHECK: activation c: float {{.*}} the activation after it")


def test_weight_only_on_qdq() -> None:
    ctx = plan(network(TWO), context("qdq", mode="weight-only"))
    assert {d.tensor for d in ctx.plan.quantized()} == {"w", "v"}
    assert ctx.requests == []
