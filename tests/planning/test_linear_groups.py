"""Integer linear layers are found by what they read, and constants go into the bias they have."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.planning import Context, add_to_bias, linear_groups
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_equivalent,
    check,
    context,
    normal,
    outputs,
    parse,
    run_pass,
)
from qcompile.targets.cpu import ACTIVATION

# Four products below 16 and two shifts are summed in another order.
ATOL = 6 * 2.0**-24 * 16


def planned(graph: Graph, mode: str = "static") -> Context:
    return run_pass(graph, PlanOperands(), ctx=context(mode=mode))


def linear(body: str, results: str = "float[N,4] y", **weights: Array) -> Graph:
    """A graph on x [N, 4] with a square weight ``w`` and what else is given."""
    given = {"w": normal(4, 4), **weights}
    return parse(f"g (float[N,4] x, bool c) => ({results}) {{ {body} }}", **given)


# Sites ----------------------------------------------------------------------------------------


def test_query_key_and_value_are_one_site() -> None:
    body = "q = MatMul(x, w) k = MatMul(x, v) s = Add(q, k) r = Relu(s) y = MatMul(r, u)"
    graph = linear(body, v=normal(4, 4), u=normal(4, 4))
    first, second = linear_groups(graph, planned(graph))
    assert (first.data, second.data) == ("x", "r")
    assert [linear.weight.name for linear in first.linears] == ["w", "v"]
    assert first.spec == second.spec == ACTIVATION
    assert [(u.node, u.index) for u in first.uses] == [("MatMul:q", 0), ("MatMul:k", 0)]
    (last,) = second.linears
    assert (last.weight_use.node, last.weight_use.index) == ("MatMul:y", 1)
    assert (last.spec.axis, last.transposed) == (1, False)


def test_readers_with_other_quantizers_are_other_sites() -> None:
    graph = linear("q = MatMul(x, w) k = MatMul(x, v) y = Add(q, k)", v=normal(4, 4))
    ctx = planned(graph)
    ctx.plan.release("MatMul:k", "by hand")
    assert [[n.node.name for n in s.linears] for s in linear_groups(graph, ctx)] == [["MatMul:q"]]


def test_a_gemm_may_hold_its_weight_transposed() -> None:
    graph = linear("h = Gemm<transB = 1>(x, w, b) y = Gemm(h, w, )", b=normal(4))
    found = [s.linears[0] for s in linear_groups(graph, planned(graph))]
    assert [(linear.transposed, linear.spec.axis) for linear in found] == [(True, 0), (False, 1)]


def test_without_a_quantizer_of_its_own_the_site_has_no_spec() -> None:
    graph = linear("y = MatMul(x, w)")
    (site,) = linear_groups(graph, planned(graph, "weight-only"))
    assert (site.data, site.spec) == ("x", None)


@pytest.mark.parametrize(
    "body",
    [
        "n = Neg(w) y = MatMul(x, n)",  # computed
        "y = MatMul(w, x)",  # the left operand
        "y = MatMul(w, v)",  # of constants alone
        "y = Relu(x)",
    ],
)
def test_other_products_are_no_site(body: str) -> None:
    graph = linear(body, v=normal(4, 4))
    assert linear_groups(graph, planned(graph)) == []


def test_a_weight_that_stays_float_is_no_site() -> None:
    graph = linear("y = MatMul(x, w)")
    ctx = planned(graph)
    ctx.plan.release("MatMul:y", "by hand")
    assert linear_groups(graph, ctx) == []


# Into the bias --------------------------------------------------------------------------------

SHIFT = np.array([1, -2, 3, 0.5], np.float32)
BRANCHES = """y = If (c) <
    then_branch = yes () => (float[N,4] p) { p = Relu(m) },
    else_branch = no () => (float[N,4] q) { q = Neg(m) }
>"""
CASES = {
    "an Add": ("m = MatMul(x, w) y = Add(m, b)", "%y = Add(%m, @b/shifted:f32[4]"),
    "an Add, bias first": ("m = MatMul(x, w) y = Add(b, m)", "%y = Add(@b/shifted:f32[4]"),
    "an Add of a scalar": ("m = MatMul(x, w) y = Add(m, s)", "%y = Add(%m, @s/shifted:f32[4]"),
    "Gemm's third operand": ("y = Gemm(x, w, b)", "%y = Gemm(%x, @w:{{.*}}, @b/shifted:f32[4]"),
    "a Gemm without": ("y = Gemm(x, w, )", "%y = Add(%y/product, @{{.*}}/bias:f32[4]"),
    "no bias": ("m = MatMul(x, w) y = Relu(m)", "%m = Add(%m/product, @{{.*}}/bias:f32[4]"),
    "an output": ("y = MatMul(x, w)", "%y = Add(%y/product, @{{.*}}/bias:f32[4]"),
    "an Add of data": ("m = MatMul(x, w) y = Add(m, x)", "%m = Add(%m/product, @{{.*}}/bias"),
    "two readers": (
        "m = MatMul(x, w) a = Add(m, b) y = Mul(a, m)",
        "%m = Add(%m/product, @{{.*}}/bias:f32[4]",
    ),
}


def shifted(graph: Graph) -> Graph:
    (site,) = linear_groups(graph, planned(graph))
    add_to_bias(graph, site.linears[0], SHIFT.astype(np.float64))
    graph.sort()
    return graph


@pytest.mark.parametrize("name", CASES)
def test_the_product_is_shifted_wherever_the_bias_is(name: str) -> None:
    """The same as the weight's product with a bias of its own, in front of all that reads it."""
    body, line = CASES[name]
    b, s = normal(4, seed=1), normal(1, seed=2)
    start = body.replace("MatMul(x, w)", "Add(p, t)").replace("y = Gemm(x, w, )", "y = Add(p, t)")
    start = start.replace("Gemm(x, w, b)", "Sum(p, b, t)")
    expected = linear(f"p = MatMul(x, w) {start}", b=b, s=s, t=SHIFT)
    graph = shifted(linear(body, b=b, s=s))
    feed = {"x": normal(3, 4, seed=3), "c": np.array(True)}
    assert_equivalent(outputs(expected, feed), outputs(graph, feed), atol=ATOL)
    check(graph, f"CHECK: {line}")


def test_an_output_in_the_middle_is_shifted_too() -> None:
    """Its name and its other readers stay."""
    graph = shifted(linear("m = MatMul(x, w) y = Add(m, b)", "float[N,4] m, float[N,4] y", b=SHIFT))
    check(
        graph,
        """
        CHECK: %m/product = MatMul(%x, @w
        CHECK-NEXT: %m = Add(%m/product, @MatMul:m/bias:f32[4]
        CHECK-NEXT: %y = Add(%m, @b:f32[4]
        """,
    )


def test_a_branch_that_reads_the_product_reads_the_shifted_one() -> None:
    graph = linear(BRANCHES.replace("y = If", "m = MatMul(x, w) y = If"))
    feed = {"x": normal(3, 4, seed=3), "c": np.array(False)}
    before = outputs(graph, feed)["y"]
    after = outputs(shifted(graph), feed)["y"]
    np.testing.assert_allclose(after, before - SHIFT, atol=ATOL)


def test_a_bias_that_others_read_keeps_its_values_for_them() -> None:
    graph = shifted(linear("m = MatMul(x, w) a = Add(m, b) y = Mul(a, b)", b=normal(4)))
    check(graph, "CHECK: Add(%m, @b/shifted\nCHECK: Mul(%a, @b:f32[4]")


@pytest.mark.parametrize("shape", [(4, 1), (3, 1, 4), ()], ids=str)
def test_a_bias_may_have_any_shape_that_broadcasts(shape: tuple[int, ...]) -> None:
    body, results = "m = MatMul(x, w) y = Add(m, b)", f"float[{'M,' * (len(shape) == 3)}N,4] y"
    bias = np.asarray(normal(12)[: int(np.prod(shape))].reshape(shape))
    feed = {"x": normal(4, 4, seed=3), "c": np.array(True)}
    before = outputs(linear(body, results, b=bias), feed)["y"]
    after = outputs(shifted(linear(body, results, b=bias)), feed)["y"]
    np.testing.assert_allclose(after, before + SHIFT, atol=ATOL)
