"""Scalar factors on scores move into the weights of the linear layer before them."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.passes.simplify.fold_attention_scale import FoldAttentionScale
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass

SCALARS = {"half": np.array(0.5, np.float32), "third": np.array(3, np.float32)}
# K = 8 products in a linear and d = 4 in the scores, all below 64 in these feeds; scaling a weight
# rounds each of them once more by 2^-24, and the sums are rounded as often in either form.
ATOL = 2 * (8 + 4) * 2.0**-24 * 64
# Scores of two heads of size 4: the left operand is linear with a bias, the right one as well.
SCORES = """
    qm = MatMul(x, wq)
    qb = Add(qm, bq)
    qr = Reshape(qb, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(qr)
    km = MatMul(x, wk)
    kb = Add(bk, km)
    kr = Reshape(kb, heads)
    k = Transpose<perm = [0, 2, 3, 1]>(kr)
"""
WEIGHTS = {
    "wq": normal(8, 8),
    "bq": normal(8, seed=1),
    "wk": normal(8, 8, seed=2),
    "bk": normal(8, seed=3),
    "heads": np.array([0, 0, 2, 4]),
    **SCALARS,
}


@pytest.mark.parametrize("scaled", ["Mul(s, half)", "Mul(half, s)", "Div(s, third)"])
def test_scores_scale_the_query(scaled: str) -> None:
    graph = parse(
        f"""g (float[B,S,8] x) => (float[B,2,S,S] y) {{
            {SCORES} s = MatMul(q, k) y = {scaled} }}""",
        **WEIGHTS,
    )
    differential(graph, FoldAttentionScale(), atol=ATOL)
    check(
        graph,
        """
        CHECK: %qm = MatMul(%x, @wq/scaled:f32[8,8]
        CHECK: %qb = Add(%qm, @bq/scaled:f32[8]
        CHECK: %km = MatMul(%x, @wk:f32[8,8]
        CHECK: %kb = Add(@bk:f32[8]
        CHECK: %y = MatMul(%q, %k)
        CHECK-NOT: half
        CHECK-NOT: third
        """,
    )


def test_both_operands_scaled_as_sdpa_does() -> None:
    graph = parse(
        f"""g (float[B,S,8] x) => (float[B,2,S,S] y) {{
            {SCORES} qs = Mul(q, half) ks = Mul(k, half) y = MatMul(qs, ks) }}""",
        **WEIGHTS,
    )
    differential(graph, FoldAttentionScale(), atol=ATOL)
    check(
        graph,
        """
        CHECK-DAG: MatMul(%x, @wq/scaled:f32[8,8]
        CHECK-DAG: MatMul(%x, @wk/scaled:f32[8,8]
        CHECK-DAG: Add(@bk/scaled:f32[8]
        CHECK-DAG: %y = MatMul(%q, %k)
        CHECK-NOT: half
        """,
    )


def test_a_chain_of_factors_folds_at_once() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y) {
            m = MatMul(x, w)
            a = Mul(m, half)
            b = Div(a, third)
            y = Relu(b)
        }""",
        w=normal(8, 8),
        **SCALARS,
    )
    differential(graph, FoldAttentionScale(), atol=ATOL)
    check(
        graph,
        """
        CHECK: %m = MatMul(%x, @w/scaled/scaled:f32[8,8]
        CHECK-NEXT: %y = Relu(%m)
        """,
    )


def test_gemm_scales_weight_and_bias() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,3] y) {
            m = Gemm<transB = 1, alpha = 2.0>(x, w, b)
            y = Mul(m, half)
        }""",
        w=normal(3, 8),
        b=normal(3),
        half=SCALARS["half"],
    )
    differential(graph, FoldAttentionScale(), atol=ATOL)
    check(graph, "CHECK: %y = Gemm(%x, @w/scaled:f32[3,8]{{.*}}, @b/scaled:f32[3]")


def test_gemm_without_a_bias() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,3] y) {
            m = Gemm(x, w, )
            y = Mul(m, half)
        }""",
        w=normal(8, 3),
        half=SCALARS["half"],
    )
    differential(graph, FoldAttentionScale(), atol=ATOL)
    check(graph, "CHECK: %y = Gemm(%x, @w/scaled:f32[8,3]")


def test_a_shared_bias_is_scaled_for_this_reader_alone() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[N,8] y) {
            m = MatMul(x, w)
            a = Add(m, b)
            s = Mul(a, half)
            y = Add(s, b)
        }""",
        w=normal(8, 8),
        b=normal(8),
        half=SCALARS["half"],
    )
    differential(graph, FoldAttentionScale(), atol=ATOL)
    check(
        graph,
        """
        CHECK: %a = Add(%m, @b/scaled:f32[8]
        CHECK: %y = Add(%a, @b:f32[8]
        """,
    )


SHARED = """y = If (c) <
    then_branch = yes () => (float[N,8] p) { p = MatMul(s, w) },
    else_branch = no () => (float[N,8] q) { q = Neg(s) }
>"""


@pytest.mark.parametrize("reader", ["y = MatMul(s, w)", SHARED], ids=["linear", "subgraph"])
def test_refuses_a_shared_weight_since_both_copies_would_be_stored(reader: str) -> None:
    graph = parse(
        f"""g (float[N,8] x, bool c) => (float[N,8] y) {{
            m = MatMul(x, w)
            s = Mul(m, half)
            {reader}
        }}""",
        w=normal(8, 8),
        half=SCALARS["half"],
    )
    assert_refused(graph, FoldAttentionScale(), "weight 'w' is shared")


BRANCHES = """z = If (c) <
    then_branch = yes () => (float[B,2,S,4] t) { t = Neg(q) },
    else_branch = no () => (float[B,2,S,4] f) { f = Abs(q) }
>"""


@pytest.mark.parametrize(
    ("outputs", "more"),
    [
        ("float[B,2,S,4] q", ""),  # a graph output in the middle
        ("float[B,2,S,4] z", "z = Neg(q)"),
        ("float[B,2,S,4] z", BRANCHES),
    ],
    ids=["graph output", "second reader", "subgraph"],
)
def test_refuses_where_the_query_has_another_reader(outputs: str, more: str) -> None:
    graph = parse(
        f"""g (float[B,S,8] x, bool c) => (float[B,2,S,S] y, {outputs}) {{
            {SCORES} s = MatMul(q, k) y = Mul(s, half) {more} }}""",
        **WEIGHTS,
    )
    assert_refused(graph, FoldAttentionScale(), "'q' has another reader")


def test_refuses_a_bias_that_is_computed() -> None:
    graph = parse(
        """g (float[N,8] x, float[3] b) => (float[N,3] y) {
            m = Gemm(x, w, b)
            y = Mul(m, half)
        }""",
        w=normal(8, 3),
        half=SCALARS["half"],
    )
    assert_refused(graph, FoldAttentionScale(), "the bias of 'Gemm:m' is not constant")


@pytest.mark.parametrize(
    "body",
    [
        "y = Mul(x, half)",  # nothing before it
        "a = Relu(x) y = Mul(a, half)",
        "m = MatMul(x, w) a = Relu(m) y = Mul(a, half)",
        "m = MatMul(w, x) y = Mul(m, half)",  # the constant is the left operand
        "m = MatMul(x, w) y = Div(half, m)",  # not a factor
        "m = MatMul(x, w) y = Mul(m, v)",  # a vector
        "m = MatMul(x, w) y = Mul(m, zero)",
        "m = MatMul(x, w) y = Mul(m, infinite)",
        "n = Neg(w) m = Gemm(x, n) y = Mul(m, half)",
        "m = MatMul(x, w) y = Div(m, zero)",
        "m = MatMul(x, w) a = Add(m, x) y = Mul(a, half)",
    ],
)
def test_other_products_are_no_refusal(body: str) -> None:
    graph = parse(
        f"g (float[8,8] x) => (float[8,8] y) {{ {body} }}",
        w=normal(8, 8),
        v=normal(8),
        half=SCALARS["half"],
        zero=np.array(0, np.float32),
        infinite=np.array(np.inf, np.float32),
    )
    ctx = run_pass(graph, FoldAttentionScale())
    assert not ctx.skips
    check(graph, "CHECK-NOT: scaled")


def test_other_types_than_float32_are_left_alone() -> None:
    graph = parse(
        """g (double[8,8] x) => (double[8,8] y) {
            m = MatMul(x, w)
            y = Mul(m, half)
        }""",
        w=normal(8, 8).astype(np.float64),
        half=np.array(0.5),
    )
    run_pass(graph, FoldAttentionScale())
    check(graph, "CHECK-NOT: scaled")


def test_a_factor_that_raises_the_rank_stays() -> None:
    graph = parse(
        "g (float[N,4] x) => (float[1,N,4] y){ h = MatMul(x, w) y = Mul(h, c) }",
        w=np.eye(4, dtype=np.float32),
        c=np.full((1, 1, 1), 0.5, np.float32),
    )
    run_pass(graph, FoldAttentionScale())
    check(graph, "CHECK: %y = Mul(%h, @c")
