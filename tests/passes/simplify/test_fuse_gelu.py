"""GELU written out with Erf or Tanh becomes one node, whatever the order of its factors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.simplify.fuse_gelu import FuseGelu
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)

# Both forms evaluate erf or tanh to a few units of 2^-23 and multiply by |x| < 5.
ATOL = 4 * 2.0**-23 * 5
# 0.5 * x * a, in every association; a is 1 + erf or 1 + tanh.
ORDERS = [
    "p = Mul(x, a) y = Mul(p, half)",
    "p = Mul(x, a) y = Mul(half, p)",
    "p = Mul(a, half) y = Mul(x, p)",
    "p = Mul(x, half) y = Mul(p, a)",
    "p = Mul(half, x) y = Mul(a, p)",
    "p = Mul(x, a) y = Div(p, two)",
    "p = Div(x, two) y = Mul(p, a)",
    "p = Div(a, two) y = Mul(p, x)",
]
ERF = "h = Div(x, root) e = Erf(h) a = Add(e, one) "
TANH = "q = Pow(x, three) r = Mul(q, cubic) s = Add(x, r) t = Mul(s, slope) e = Tanh(t) "
TANH += "a = Add(e, one) "


def gelu(body: str, opset: int = 17, outputs: str = "float[B,S,4] y", **changed: float) -> Graph:
    scalars = {
        "half": 0.5,
        "one": 1.0,
        "two": 2.0,
        "three": 3.0,
        "root": math.sqrt(2),
        "inverse": math.sqrt(0.5),
        "cubic": 0.044715,
        "slope": math.sqrt(2 / math.pi),
        **changed,
    }
    return parse(
        f"g (float[B,S,4] x, bool c) => ({outputs}) {{ {body} }}",
        opset,
        **{name: np.array(value, np.float32) for name, value in scalars.items()},
    )


@pytest.mark.parametrize("order", ORDERS)
def test_erf_form(order: str) -> None:
    graph = gelu(ERF + order)
    differential(graph, FuseGelu(), atol=ATOL)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %y = com.microsoft.Gelu(%x){{$}}
        CHECK-NOT: =
        """,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_tanh_form(order: str) -> None:
    graph = gelu(TANH + order)
    differential(graph, FuseGelu(), atol=ATOL)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %y = com.microsoft.FastGelu(%x){{$}}
        CHECK-NOT: =
        """,
    )


@pytest.mark.parametrize(
    ("old", "new"), [("Div(x, root)", "Mul(x, inverse)"), ("Div(x, root)", "Mul(inverse, x)")]
)
def test_erf_argument(old: str, new: str) -> None:
    graph = gelu(ERF.replace(old, new) + ORDERS[0])
    differential(graph, FuseGelu(), atol=ATOL)
    check(graph, "CHECK: %y = com.microsoft.Gelu(%x)")


@pytest.mark.parametrize(
    "cube",
    [
        "r = Mul(cubic, q)",
        "k = Mul(x, x) q2 = Mul(k, x) r = Mul(q2, cubic)",
        "k = Mul(x, cubic) q2 = Mul(k, x) r = Mul(q2, x)",
        "k = Mul(x, x) q2 = Mul(x, cubic) r = Mul(k, q2)",
    ],
)
def test_cube_in_any_association(cube: str) -> None:
    graph = gelu(TANH.replace("r = Mul(q, cubic)", cube) + ORDERS[0])
    differential(graph, FuseGelu(), atol=ATOL)
    check(graph, "CHECK: %y = com.microsoft.FastGelu(%x)")


def test_operands_of_the_sums_in_either_order() -> None:
    graph = gelu(TANH.replace("(x, r)", "(r, x)").replace("(e, one)", "(one, e)") + ORDERS[0])
    differential(graph, FuseGelu(), atol=ATOL)
    check(graph, "CHECK: %y = com.microsoft.FastGelu(%x)")


def test_constants_that_exporters_rounded() -> None:
    """0.7979 for sqrt(2 / pi) and 1.4142 for sqrt(2)."""
    graph = gelu(TANH + "p = Mul(x, half) y = Mul(p, a)", slope=0.7979)
    run_pass(graph, FuseGelu())
    check(graph, "CHECK: FastGelu(%x)")
    graph = gelu(ERF + ORDERS[0], root=1.4142)
    run_pass(graph, FuseGelu())
    check(graph, "CHECK: Gelu(%x)")


def test_the_target_chooses_the_operator() -> None:
    graph = gelu(TANH + ORDERS[0], opset=20)
    differential(graph, FuseGelu(), atol=ATOL)
    check(graph, "CHECK: %y = Gelu(%x) {approximate='tanh'}")
    graph = gelu(ERF + ORDERS[0], opset=20)
    differential(graph, FuseGelu(), atol=ATOL, ctx=context("qdq"))
    check(graph, "CHECK: %y = Gelu(%x){{$}}")


@pytest.mark.parametrize("form", [ERF, TANH])
def test_refuses_where_the_target_has_none(form: str) -> None:
    graph = gelu(form + ORDERS[0])
    assert_refused(graph, FuseGelu(), "target 'qdq' has no Gelu at opset 17", context("qdq"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ERF.replace("root", "two") + ORDERS[0], "not x / sqrt(2)"),
        (ERF.replace("Div(x, root)", "Div(root, x)") + ORDERS[0], "not x / sqrt(2)"),
        (ERF.replace("Div(x, root)", "Neg(x)") + ORDERS[0], "not x / sqrt(2)"),
        (ERF.replace("Erf(h)", "Erf(x)") + "p = Mul(h, a) y = Mul(p, half)", "not x / sqrt(2)"),
        (ERF.replace("(e, one)", "(e, two)") + ORDERS[0], "not multiplied by 0.5 and x"),
        (ERF.replace("Add(e, one)", "Sub(e, one)") + ORDERS[0], "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(x, a) y = Mul(p, root)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(x, a) y = Div(half, p)", "not multiplied by 0.5 and x"),
        (ERF + "p = Div(x, a) y = Mul(p, half)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(h, a) y = Mul(p, half)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(x, x) k = Mul(p, a) y = Mul(k, half)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(a, a) y = Mul(p, half)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(x, a) k = Mul(p, x) y = Mul(k, half)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(a, half) k = Mul(p, half) y = Mul(k, x)", "not multiplied by 0.5 and x"),
        (ERF + "p = Div(a, x) y = Mul(p, half)", "not multiplied by 0.5 and x"),
        (ERF + "p = Add(x, a) y = Mul(p, half)", "not multiplied by 0.5 and x"),
        (ERF + "p = Add(x, half) y = Mul(p, a)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(x, x) y = Mul(p, a)", "not multiplied by 0.5 and x"),
        (ERF + "z = Neg(x) p = Mul(z, half) y = Mul(p, a)", "not multiplied by 0.5 and x"),
        (ERF + "z = Neg(x) p = Mul(half, z) y = Mul(p, a)", "not multiplied by 0.5 and x"),
        (ERF + "v = Mul(x, half) p = Mul(x, a) y = Mul(p, v)", "not multiplied by 0.5 and x"),
        (ERF + "v = Mul(x, half) p = Mul(a, half) y = Mul(p, v)", "not multiplied by 0.5 and x"),
        (ERF + "p = Mul(x, a) y = Neg(p)", "not multiplied by 0.5 and x"),
        (ERF.replace("Div(x, root)", "Add(x, inverse)") + ORDERS[0], "not x / sqrt(2)"),
        (ERF.replace("h = Div(x, root) e = Erf(h)", "e = Erf(x)") + ORDERS[0], "not x / sqrt(2)"),
        (ERF + "y = Mul(x, a)", "not multiplied by 0.5 and x"),
        (TANH + "y = Mul(x, a)", "not multiplied by 0.5 and x"),
    ],
)
def test_refuses_a_wrong_constant_or_factor(body: str, reason: str) -> None:
    assert_refused(gelu(body), FuseGelu(), reason)


@pytest.mark.parametrize(
    "argument",
    [
        TANH.replace("cubic", "half"),
        TANH.replace("slope", "half"),
        TANH.replace("three", "two"),
        TANH.replace("Add(x, r)", "Sub(x, r)"),
        TANH.replace("Mul(s, slope)", "Add(s, slope)"),
        TANH.replace("Pow(x, three)", "Div(x, three)"),
        TANH.replace("Pow(x, three)", "Mul(x, x)"),
        TANH.replace("Pow(x, three)", "Neg(x)"),
        TANH.replace("r = Mul(q, cubic)", "z = Neg(x) k = Mul(q, z) r = Mul(k, cubic)"),
        TANH.replace("q = Pow(x, three)", "z = Neg(x) k = Mul(x, x) q = Mul(k, z)"),
        "e = Tanh(x) a = Add(e, one) ",
    ],
)
def test_another_tanh_is_no_refusal(argument: str) -> None:
    graph = gelu(argument + ORDERS[0])
    ctx = run_pass(graph, FuseGelu())
    assert not ctx.skips
    check(graph, "CHECK: Tanh(")


@pytest.mark.parametrize("form", [ERF, TANH])
@pytest.mark.parametrize("inner", ["e", "a", "p"])
def test_refuses_where_an_inner_tensor_is_a_graph_output(form: str, inner: str) -> None:
    graph = gelu(form + ORDERS[0], outputs=f"float[B,S,4] y, float[B,S,4] {inner}")
    assert_refused(graph, FuseGelu(), "an inner tensor is used elsewhere")


def test_refuses_where_a_subgraph_reads_an_inner_tensor() -> None:
    branches = """y = If (c) <
        then_branch = yes () => (float[B,S,4] t) { t = Neg(a) },
        else_branch = no () => (float[B,S,4] f) { f = Abs(o) }
    >"""
    graph = gelu(ERF + "p = Mul(x, a) o = Mul(p, half) " + branches)
    assert_refused(graph, FuseGelu(), "an inner tensor is used elsewhere")


def test_inner_tensors_before_erf_may_be_seen_outside() -> None:
    graph = gelu(ERF + ORDERS[0], outputs="float[B,S,4] y, float[B,S,4] h")
    differential(graph, FuseGelu(), atol=ATOL)
    check(
        graph,
        """
        CHECK-DAG: %h = Div(%x, @root
        CHECK-DAG: %y = com.microsoft.Gelu(%x)
        CHECK-NOT: Erf
        """,
    )


def test_x_and_the_result_may_be_read_by_anything() -> None:
    """Residual, subgraph and shared scalar constants."""
    branches = """o = If (c) <
        then_branch = yes () => (float[B,S,4] t) { t = Neg(z) },
        else_branch = no () => (float[B,S,4] f) { f = Abs(z) }
    > y = Add(o, k)"""
    graph = gelu(ERF + "p = Mul(x, a) z = Mul(p, half) k = Mul(x, half) " + branches)
    feeds = [{"c": np.array(c), "x": normal(1, 3, 4)} for c in (True, False)]
    differential(graph, FuseGelu(), atol=ATOL, feeds=feeds)
    check(
        graph,
        """
        CHECK-DAG: %z = com.microsoft.Gelu(%x)
        CHECK-DAG: %k = Mul(%x, @half:f32[]=0.5)
        """,
    )


def test_two_in_a_row() -> None:
    second = ERF.replace("x", "z").replace("h ", "h2 ").replace("(h)", "(h2)")
    second = second.replace("e ", "e2 ").replace("(e,", "(e2,").replace("a ", "a2 ")
    body = ERF + "p = Mul(x, a) z = Mul(p, half) " + second + "p2 = Mul(z, a2) y = Mul(p2, half)"
    graph = gelu(body)
    differential(graph, FuseGelu(), atol=2 * ATOL)
    check(
        graph,
        """
        CHECK: [[Z:%[^ ]+]] = com.microsoft.Gelu(%x)
        CHECK-NEXT: %y = com.microsoft.Gelu([[Z]])
        """,
    )
