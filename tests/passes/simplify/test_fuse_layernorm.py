"""Layer normalization written out as elementary operators becomes one node."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.simplify.fold_constants import FoldConstants
from qcompile.passes.simplify.fuse_layernorm import FuseLayerNorm
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass

FUSED = "CHECK: %y = LayerNormalization(%x, @g:f32[8]{{.*}}, @b:f32[8]{{.*}}) {axis=-1, epsilon="
# Both forms round about H + 8 = 16 times, by 2^-24 relative to values below 8 in these feeds.
ATOL = 16 * 2.0**-24 * 8


def decomposed(
    *changes: tuple[str, str], opset: int = 17, width: str = "8", **weights: Array
) -> Graph:
    """y = layer_norm(x), the way exporters below opset 17 write it, with changes to the text."""
    text = """g (float[B,S,W] x, bool c) => (float[B,S,8] y) {
        m = ReduceMean<axes = [-1]>(x)
        d = Sub(x, m)
        q = Pow(d, two)
        v = ReduceMean<axes = [-1]>(q)
        s = Add(v, e)
        r = Sqrt(s)
        n = Div(d, r)
        p = Mul(n, g)
        y = Add(p, b)
    }""".replace("W]", f"{width}]")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    scalars = {"e": np.array(1e-5, np.float32), "two": np.array(2, np.float32)}
    found = {"g": normal(8), "b": normal(8, seed=1), **scalars, **weights}
    return parse(text, opset, **found)


@pytest.mark.parametrize(
    "change",
    [
        ("y", "y"),
        ("Pow(d, two)", "Mul(d, d)"),
        ("Add(v, e)", "Add(e, v)"),
        ("Mul(n, g)", "Mul(g, n)"),
        ("Add(p, b)", "Add(b, p)"),
        ("[-1]", "[2]"),
    ],
    ids=lambda change: change[1],
)
def test_every_spelling_is_fused(change: tuple[str, str]) -> None:
    graph = decomposed(change)
    differential(graph, FuseLayerNorm(), atol=ATOL)
    check(graph, FUSED + "9.99999975e-06}\nCHECK-NOT: =")


def test_axes_may_be_an_input_as_in_opset_18() -> None:
    graph = decomposed(
        ("ReduceMean<axes = [-1]>(x)", "ReduceMean(x, last)"),
        ("ReduceMean<axes = [-1]>(q)", "ReduceMean(q, last)"),
        opset=18,
        last=np.array([-1]),
    )
    differential(graph, FuseLayerNorm(), atol=ATOL)
    check(graph, FUSED)


def test_two_in_a_row_share_their_scale() -> None:
    """A shared initializer is read by both; the output of the first is the input of the second."""
    again = """o = Add(p, b)
        m2 = ReduceMean<axes = [-1]>(o)
        d2 = Sub(o, m2)
        q2 = Mul(d2, d2)
        v2 = ReduceMean<axes = [-1]>(q2)
        s2 = Add(v2, e)
        r2 = Sqrt(s2)
        n2 = Div(d2, r2)
        p2 = Mul(n2, g)
        y = Add(p2, b)"""
    graph = decomposed(("y = Add(p, b)", again))
    differential(graph, FuseLayerNorm(), atol=2 * ATOL)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: [[O:%[^ ]+]] = LayerNormalization(%x, @g:{{[^ ]+}}, @b:{{[^ ]+}})
        CHECK-NEXT: %y = LayerNormalization([[O]], @g:{{[^ ]+}}, @b:{{[^ ]+}})
        CHECK-NOT: %
        """,
    )


def test_a_folded_shift_is_as_good_as_a_loaded_one() -> None:
    graph = decomposed(("y = Add(p, b)", "k = Neg(b) y = Add(p, k)"))
    run_pass(graph, FoldConstants(), FuseLayerNorm())
    check(graph, "CHECK: %y = LayerNormalization(%x, @g:f32[8]{{.*}}, @k/folded:f32[8]")


def test_one_value_broadcasts_as_before() -> None:
    graph = decomposed(g=normal(1), b=normal(1))
    differential(graph, FuseLayerNorm(), atol=ATOL)


def test_an_inner_tensor_before_the_root_may_be_seen_outside() -> None:
    """The centred values are a graph output: they stay, the rest is fused."""
    graph = decomposed(("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,S,8] d)"))
    differential(graph, FuseLayerNorm(), atol=ATOL)
    check(
        graph,
        """
        CHECK-DAG: %d = Sub(%x, %m)
        CHECK-DAG: %y = LayerNormalization(%x,
        CHECK-NOT: Sqrt
        """,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("ReduceMean<axes = [-1]>(x)", "ReduceMean<axes = [1]>(x)"), "not over the last axis"),
        (("ReduceMean<axes = [-1]>(q)", "ReduceMean<axes = [0]>(q)"), "not over the last axis"),
        (("[-1]>(x)", "[-1]>(z)"), "mean of the same values"),
        (("Pow(d, two)", "Pow(d, e)"), "no square under the mean"),
        (("Pow(d, two)", "Mul(d, x)"), "no square under the mean"),
        (("Pow(d, two)", "Add(d, d)"), "no square under the mean"),
        (("[-1]>(q)", "[-1]>(x)"), "no square under the mean"),
        (("Pow(d, two)", "Mul(x, x)"), "not centred"),
        (("Sub(x, m)", "Add(x, m)"), "not centred"),
        (("Sub(x, m)", "Sub(x, x)"), "mean of the same values"),
        (("m = ReduceMean", "m = ReduceMax"), "mean of the same values"),
        (("v = ReduceMean", "v = ReduceMax"), "no mean of squares"),
        (("Sqrt(s)", "Sqrt(x)"), "no epsilon"),
        (("Add(v, e)", "Mul(v, e)"), "no epsilon"),
        (("Add(v, e)", "Add(v, v)"), "no mean of squares"),
        (("Div(d, r)", "Div(x, r)"), "does not divide the centred values"),
        (("Div(d, r)", "Mul(d, r)"), "does not divide the centred values"),
        (("Mul(n, g)", "Mul(n, x)"), "not a constant vector"),
        (("Mul(n, g)", "Mul(n, n)"), "not read by Mul alone"),
        (("Mul(n, g)", "Add(n, g)"), "not read by Mul alone"),
        (("Add(p, b)", "Add(p, e)"), "not a constant vector"),
        (("Add(p, b)", "Sub(p, b)"), "not read by Add alone"),
        (("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,S,8] n)"), "not read by Mul alone"),
        (("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,S,8] p)"), "not read by Add alone"),
        (("y = Add(p, b)", "o = Add(p, b) y = Add(o, p)"), "not read by Add alone"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_refuses_what_only_looks_like_it(change: tuple[str, str], reason: str) -> None:
    graph = decomposed(change, ("m = ", "z = Neg(x) m = "))
    graph.remove_dead()  # z, where nothing reads it
    assert_refused(graph, FuseLayerNorm(), reason)


def test_refuses_means_that_lose_their_axis() -> None:
    """In a square matrix the mean of row j would be subtracted from column j."""
    graph = decomposed(("[-1]>", "[-1], keepdims = 0>"), ("[B,S,8]", "[8,8]"))
    assert_refused(graph, FuseLayerNorm(), "not over the last axis")


def test_refuses_a_scale_that_widens_the_values() -> None:
    graph = decomposed(width="1")
    assert_refused(graph, FuseLayerNorm(), "does not fit values of shape ('B', 'S', 1)")


def test_refuses_axes_that_are_computed() -> None:
    graph = decomposed(
        ("ReduceMean<axes = [-1]>(x)", "ReduceMean(x, last)"),
        ("ReduceMean<axes = [-1]>(q)", "ReduceMean(q, last)"),
        ("bool c", "bool c, int64[1] last"),
        opset=18,
    )
    assert_refused(graph, FuseLayerNorm(), "not over the last axis")


def test_refuses_scale_and_shift_of_different_shape() -> None:
    graph = decomposed(b=normal(1))
    assert_refused(graph, FuseLayerNorm(), "differ in shape")


def test_refuses_an_opset_without_the_operator() -> None:
    assert_refused(
        decomposed(opset=14), FuseLayerNorm(), "LayerNormalization needs opset 17, this is 14"
    )


def test_refuses_where_a_subgraph_reads_an_inner_tensor() -> None:
    branches = """y = If (c) <
        then_branch = yes () => (float[B,S,8] t) { t = Neg(n) },
        else_branch = no () => (float[B,S,8] f) { f = Abs(o) }
    >"""
    graph = decomposed(("y = Add(p, b)", f"o = Add(p, b) {branches}"))
    assert_refused(graph, FuseLayerNorm(), "'n' is not read by Mul alone")


def test_a_subgraph_reads_the_result() -> None:
    branches = """y = If (c) <
        then_branch = yes () => (float[B,S,8] t) { t = Neg(o) },
        else_branch = no () => (float[B,S,8] f) { f = Abs(o) }
    >"""
    graph = decomposed(("y = Add(p, b)", f"o = Add(p, b) {branches}"))
    feeds = [{"c": np.array(c), "x": normal(1, 3, 8)} for c in (True, False)]
    differential(graph, FuseLayerNorm(), atol=ATOL, feeds=feeds)
    check(graph, "CHECK: %o = LayerNormalization(%x,")
