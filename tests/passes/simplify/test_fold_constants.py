"""Nodes over constants alone are computed once, exactly as ONNX Runtime would compute them."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.passes.simplify.fold_constants import FoldConstants
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)


def test_a_chain_becomes_one_constant() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            s = Add(a, b)
            m = Mul(s, b)
            y = Add(x, m)
        }""",
        a=normal(4),
        b=normal(4, seed=1),
    )
    differential(graph, FoldConstants(), atol=0)  # exact
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %y = Add(%x, @m/folded:f32[4]
        CHECK-NOT: =
        """,
    )


def test_omitted_inputs_are_no_obstacle() -> None:
    graph = parse(
        """g (float[N,3] x) => (float[N,3] y) {
            c = Clip(a, , hi)
            y = Add(x, c)
        }""",
        a=np.array([-2, 0.5, 2], np.float32),
        hi=np.array(1, np.float32),
    )
    differential(graph, FoldConstants(), atol=0)
    check(graph, "CHECK: %y = Add(%x, @c/folded:f32[3]")


def test_a_folded_graph_output_keeps_its_node_and_its_name() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y, float[4] s) {
            s = Add(a, a)
            y = Mul(x, s)
        }""",
        a=normal(4),
    )
    ctx = run_pass(graph, FoldConstants())
    assert not ctx.skips
    check(
        graph,
        """
        CHECK: -> (%y, %s)
        CHECK-NEXT: %s = Add(@a:f32[4]#[[A:[0-9a-f]+]], @a:f32[4]#[[A]])
        CHECK-NEXT: %y = Mul(%x, %s)
        """,
    )


def test_a_shared_initializer_stays_for_its_other_readers() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            n = Neg(a)
            t = Mul(x, a)
            y = Add(t, n)
        }""",
        a=normal(4),
    )
    differential(graph, FoldConstants(), atol=0)
    check(
        graph,
        """
        CHECK: %t = Mul(%x, @a:f32[4]
        CHECK: %y = Add(%t, @n/folded:f32[4]
        """,
    )


def test_what_a_subgraph_reads_by_name_keeps_its_node() -> None:
    """The body of an If is never edited: it goes on asking for n, the main graph for constants."""
    graph = parse(
        """g (bool c, float[4] x) => (float[4] y) {
            n = Neg(a)
            m = Exp(n)
            i = If (c) <
                then_branch = yes () => (float[4] p) { p = Add(x, n) },
                else_branch = no () => (float[4] q) { q = Sub(x, n) }
            >
            y = Add(i, m)
        }""",
        a=normal(4),
    )
    feeds = [{"c": np.array(c), "x": normal(4, seed=1)} for c in (True, False)]
    differential(graph, FoldConstants(), atol=0, feeds=feeds)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %n = Neg(@a:f32[4]
        CHECK-NEXT: %i = If(%c)
        CHECK-NEXT: %y = Add(%i, @m/folded:f32[4]
        """,
    )


def test_quantizers_random_operators_and_subgraphs_stay() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            w = DequantizeLinear(q, s)
            r = RandomUniformLike(a)
            i = If (c) <
                then_branch = yes () => (float[4] p) { p = Neg(a) },
                else_branch = no () => (float[4] n) { n = Abs(a) }
            >
            t = Add(x, w)
            u = Add(t, r)
            y = Add(u, i)
        }""",
        q=np.arange(4, dtype=np.uint8),
        s=np.array(0.5, np.float32),
        c=np.array(True),
        a=normal(4),
    )
    ctx = run_pass(graph, FoldConstants())
    assert not ctx.skips
    check(
        graph,
        """
        CHECK: DequantizeLinear(
        CHECK: RandomUniformLike(
        CHECK: If(
        """,
    )


TILE = """g (float[N,65536] x) => (float[N,65536] y) {
    t = Tile(a, times)
    y = Add(x, t)
}"""


def test_refuses_results_that_would_blow_up_the_file() -> None:
    graph = parse(TILE, a=normal(4), times=np.array([16384]))
    assert_refused(graph, FoldConstants(), "much larger than its operands")


def test_max_growth_admits_larger_results() -> None:
    graph = parse(TILE, a=normal(4), times=np.array([16384]))
    run_pass(graph, FoldConstants(max_growth=1e5))
    check(graph, "CHECK: %y = Add(%x, @t/folded:f32[65536]")


def test_refuses_results_of_unknown_size() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            n = NonZero(a)
            y = GatherElements<axis = 1>(x, n)
        }""",
        a=np.ones(4, np.float32),
    )
    assert_refused(graph, FoldConstants(), "of unknown size")


def test_refuses_what_the_runtime_cannot_compute() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            b = Gather(a, nine)
            y = Add(x, b)
        }""",
        a=normal(4),
        nine=np.array(9),
    )
    assert_refused(graph, FoldConstants(), "cannot be evaluated")


@pytest.mark.parametrize("rows", [1, 3])
def test_folds_a_product_bit_by_bit(rows: int) -> None:
    """Constants come from the same kernel that would have run: no tolerance at all."""
    graph = parse(
        """g (float[N,R,8] x) => (float[N,R,8] y) {
            m = MatMul(a, b)
            y = Add(x, m)
        }""",
        a=normal(rows, 8),
        b=normal(8, 8, seed=1),
    )
    feeds = [{"x": normal(n, rows, 8, seed=2)} for n in (1, 2)]
    differential(graph, FoldConstants(), atol=0, feeds=feeds)
    check(graph, "CHECK: %y = Add(%x, @m/folded:f32[")


def test_mode_float_leaves_weights_as_they_are_stored() -> None:
    graph = parse(
        "g (float[N,32,32] x) => (float[N,32,32] y) { w = Cast<to = 1>(h) y = Add(x, w) }",
        h=normal(32, 32).astype(np.float16),
    )
    assert_refused(graph, FoldConstants(), "much larger than its operands", context(mode="float"))
    differential(graph, FoldConstants(), atol=0)  # to be quantized, it must be float32


def test_what_is_computed_from_small_constants_is_known_for_that() -> None:
    graph = parse(
        """g (float[N,32] x) => (float[N,32] y) {
            z = ConstantOfShape(s)
            m = Add(z, one)
            n = Neg(w)
            p = Mul(m, n)
            a = MatMul(x, p)
            y = Add(a, m)
        }""",
        s=np.array([1, 32]),
        one=np.array(1, np.float32),
        w=normal(32, 32),
    )
    ctx = run_pass(graph, FoldConstants())
    assert ctx.generated == {"z/folded", "m/folded"}
    assert "n/folded" in graph.constants()
