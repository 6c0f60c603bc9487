"""Products read their right operand transposed instead of copying it first."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.fusion.fuse_key_transpose import FuseKeyTranspose
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass

# The same K = 4 products of values below 5, summed in another order.
ATOL = 2 * 4 * 2.0**-24 * (4 * 5 * 5)
KEY = "t = Transpose<perm = [0, 2, 3, 1]>(k) "
QUERY = "float[B,2,S,4] q"
SCORES = "float[B,2,S,T] y"


def scores(
    body: str, k: str = "float[B,T,2,4] k", outputs: str = SCORES, q: str = QUERY, **weights: Array
) -> Graph:
    return parse(f"g ({q}, {k}, bool c) => ({outputs}) {{ {body} }}", **weights)


def test_what_is_left_of_the_permutation_moves_whole_rows() -> None:
    graph = scores(KEY + "y = MatMul(q, t)")
    differential(graph, FuseKeyTranspose(), atol=ATOL)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: [[ROWS:%[^ ]+]] = Transpose(%k) {perm=[0, 2, 1, 3]}
        CHECK-NEXT: %y = com.microsoft.FusedMatMul(%q, [[ROWS]]) {transB=1}
        """,
    )


def test_a_plain_swap_disappears() -> None:
    graph = scores("t = Transpose<perm = [0, 1, 3, 2]>(k) y = MatMul(q, t)", k="float[B,2,T,4] k")
    differential(graph, FuseKeyTranspose(), atol=ATOL)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %y = com.microsoft.FusedMatMul(%q, %k) {transB=1}
        """,
    )


def test_operands_of_different_rank() -> None:
    graph = scores(
        "t = Transpose<perm = [0, 2, 1]>(k) y = MatMul(q, t)",
        k="float[B,T,4] k",
        outputs="float[B,S,T] y",
        q="float[S,4] q",
    )
    differential(graph, FuseKeyTranspose(), atol=ATOL)
    check(graph, "CHECK: FusedMatMul(%q, %k) {transB=1}")


def test_the_product_of_a_tensor_with_itself() -> None:
    graph = scores(
        "t = Transpose<perm = [0, 1, 3, 2]>(q) y = MatMul(q, t)", outputs="float[B,2,S,S] y"
    )
    differential(graph, FuseKeyTranspose(), atol=ATOL)
    check(graph, "CHECK: FusedMatMul(%q, %q) {transB=1}")


def test_a_subgraph_reads_the_scores() -> None:
    branches = """y = If (c) <
        then_branch = yes () => (float[B,2,S,T] p) { p = Neg(s) },
        else_branch = no () => (float[B,2,S,T] n) { n = Abs(s) }
    >"""
    graph = scores(KEY + "s = MatMul(q, t) " + branches)
    shapes = {"q": normal(1, 2, 1, 4), "k": normal(1, 3, 2, 4)}
    feeds = [{**shapes, "c": np.array(c)} for c in (True, False)]
    differential(graph, FuseKeyTranspose(), atol=ATOL, feeds=feeds)
    check(graph, "CHECK: %s = com.microsoft.FusedMatMul(")


BRANCHES = """z = If (c) <
    then_branch = yes () => (float[B,2,4,T] p) { p = Neg(t) },
    else_branch = no () => (float[B,2,4,T] n) { n = Abs(t) }
>"""


@pytest.mark.parametrize(
    ("more", "output"),
    [("z = Neg(t)", "float[B,2,4,T] z"), ("", "float[B,2,4,T] t"), (BRANCHES, "float[B,2,4,T] z")],
    ids=["second reader", "graph output", "subgraph"],
)
def test_refuses_where_the_transposed_key_is_needed(more: str, output: str) -> None:
    graph = scores(KEY + "y = MatMul(q, t) " + more, outputs=f"{SCORES}, {output}")
    assert_refused(graph, FuseKeyTranspose(), "the transposed operand has other readers")


def test_plain_matrices_are_left_to_the_runtime() -> None:
    graph = scores(
        "t = Transpose<perm = [1, 0]>(k) y = MatMul(q, t)",
        "float[T,4] k",
        "float[S,T] y",
        "float[S,4] q",
    )
    ctx = run_pass(graph, FuseKeyTranspose())
    assert not ctx.skips
    check(graph, "CHECK: %y = MatMul(%q, %t)")


def test_refuses_other_types() -> None:
    graph = scores(
        KEY + "y = MatMul(q, t)",
        q=QUERY.replace("float", "double"),
        k="double[B,T,2,4] k",
        outputs=SCORES.replace("float", "double"),
    )
    assert_refused(graph, FuseKeyTranspose(), "not known to be float32")


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose<perm = [0, 1, 2, 3]>(k) y = MatMul(q, t)",
        "t = Transpose<perm = [1, 0, 2, 3]>(k) y = MatMul(q, t)",
        "t = Transpose<perm = [0, 1, 3, 2]>(q) y = MatMul(t, k)",  # the left operand
        "t = Transpose<perm = [0, 1, 3, 2]>(w) y = MatMul(q, t)",  # a constant: folded elsewhere
    ],
)
def test_rows_that_stay_rows_are_no_refusal(body: str) -> None:
    cube = "float[4,4,4,4]"
    graph = scores(body, f"{cube} k", f"{cube} y", f"{cube} q", w=normal(4, 4, 4, 4))
    ctx = run_pass(graph, FuseKeyTranspose())
    assert not ctx.skips
    check(graph, "CHECK-NOT: FusedMatMul")
