"""Equal nodes on equal inputs are computed once."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.passes.simplify.merge_duplicates import MergeDuplicates
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)


def test_a_chain_written_twice_is_computed_once() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = Mul(x, w)
            b = Exp(a)
            c = Mul(x, w)
            d = Exp(c)
            y = Add(b, d)
        }""",
        w=normal(4),
    )
    differential(graph, MergeDuplicates(), atol=0)  # exact
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %a = Mul(%x, @w:f32[4]
        CHECK-NEXT: %b = Exp(%a)
        CHECK-NEXT: %y = Add(%b, %b)
        """,
    )


def test_small_constants_count_by_content() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = Add(x, one)
            b = Add(x, uno)
            y = Mul(a, b)
        }""",
        one=np.array(1, np.float32),
        uno=np.array(1, np.float32),
    )
    differential(graph, MergeDuplicates(), atol=0)
    check(graph, "CHECK: %y = Mul(%a, %a)")


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, w) b = Add(w, x)",  # other order: not the same node
        "a = Add(x, w) b = Add(x, v)",  # large constants count by name
        "a = Clip(x, , s) b = Clip(x, s)",  # an omitted input is not an absent one
        "a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.2>(x)",
        "a = Softmax<axis = 0>(x) b = Softmax(x)",
        "a = RandomNormalLike(x) b = RandomNormalLike(x)",
    ],
)
def test_different_or_random_nodes_stay(body: str) -> None:
    graph = parse(
        f"g (float[N,65] x) => (float[N,65] y) {{{body} y = Sub(a, b) }}",
        w=normal(65),
        v=normal(65),
        s=np.array(1, np.float32),
    )
    ctx = run_pass(graph, MergeDuplicates())
    assert not ctx.skips
    check(graph, "CHECK: %y = Sub(%a, %b)")


def test_omitted_inputs_are_equal() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = Clip(x, , s)
            b = Clip(x, , s)
            y = Sub(a, b)
        }""",
        s=np.array(1, np.float32),
    )
    differential(graph, MergeDuplicates(), atol=0)
    check(graph, "CHECK: %y = Sub(%a, %a)")


def test_an_omitted_output_cannot_stand_for_another() -> None:
    """The first LSTM makes no sequence, which the others make; its state is its own."""
    graph = parse(
        """g (float[S,B,2] x) => (float[1,B,3] h, float[S,1,B,3] y) {
            , a = LSTM<hidden_size = 3>(x, w, r)
            b, c = LSTM<hidden_size = 3>(x, w, r)
            d, e = LSTM<hidden_size = 3>(x, w, r)
            h = Add(a, e)
            y = Add(b, d)
        }""",
        w=normal(1, 12, 2),
        r=normal(1, 12, 3),
    )
    differential(graph, MergeDuplicates(), atol=0)
    check(
        graph,
        """
        CHECK: %h = Add(%a, %c)
        CHECK-NEXT: %y = Add(%b, %b)
        """,
    )


def test_a_graph_output_absorbs_its_later_duplicate() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] a, float[N,4] y) {
            a = Exp(x)
            b = Exp(x)
            y = Neg(b)
        }"""
    )
    differential(graph, MergeDuplicates(), atol=0)
    check(
        graph,
        """
        CHECK: -> (%a, %y)
        CHECK-NEXT: %a = Exp(%x)
        CHECK-NEXT: %y = Neg(%a)
        """,
    )


def test_refuses_a_duplicate_that_is_a_graph_output() -> None:
    graph = parse("g (float[4] x) => (float[4] a, float[4] b) { a = Exp(x) b = Exp(x) }")
    assert_refused(graph, MergeDuplicates(), "carries the name of a graph output")


def test_refuses_a_duplicate_that_a_subgraph_reads() -> None:
    graph = parse(
        """g (bool c, float[N,4] x) => (float[N,4] y) {
            a = Exp(x)
            b = Exp(x)
            i = If (c) <
                then_branch = yes () => (float[N,4] p) { p = Neg(b) },
                else_branch = no () => (float[N,4] q) { q = Abs(x) }
            >
            y = Add(a, i)
        }"""
    )
    assert_refused(graph, MergeDuplicates(), "carries the name")


def test_equal_subgraphs_stay() -> None:
    graph = parse(
        """g (bool c, float[N,4] x) => (float[N,4] y) {
            a = If (c) <
                then_branch = yes () => (float[N,4] p) { p = Neg(x) },
                else_branch = no () => (float[N,4] q) { q = Abs(x) }
            >
            b = If (c) <
                then_branch = yes () => (float[N,4] p) { p = Neg(x) },
                else_branch = no () => (float[N,4] q) { q = Abs(x) }
            >
            y = Add(a, b)
        }"""
    )
    run_pass(graph, MergeDuplicates())
    check(graph, "CHECK: %y = Add(%a, %b)")


def test_equal_weights_are_one_if_asked() -> None:
    """Later: what folds factors into a weight refuses shared ones."""
    text = "g (float[N,16] x) => (float[N,16] y) { a = MatMul(x, v) y = MatMul(a, w) }"
    graph = parse(text, v=normal(16, 16), w=normal(16, 16))
    assert not MergeDuplicates().run(graph, context())
    differential(graph, MergeDuplicates(weights=True), atol=0)
    check(graph, "CHECK: MatMul(%x, @v\nCHECK: %y = MatMul(%a, @v")
