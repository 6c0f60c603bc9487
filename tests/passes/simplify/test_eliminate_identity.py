"""Nodes that return their input disappear; names that are visible outside survive."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir.printer import dump
from qcompile.passes.simplify.eliminate_identity import EliminateIdentity
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass


@pytest.mark.parametrize(
    "body",
    [
        "i = Identity(x)",
        "i = Dropout(x)",
        "i = Dropout(x, ratio)",
        "i = Dropout(x, , training)",
        "i = Cast<to = 1>(x)",
        "i = Concat<axis = 1>(x)",
        "i = Sum(x)",
        "i = Transpose<perm = [0, 1, 2]>(x)",
        "t = Transpose<perm = [1, 2, 0]>(x) i = Transpose<perm = [2, 0, 1]>(t)",
        "a = Identity(x) b = Identity(a) i = Identity(b)",
    ],
)
def test_returns_its_input(body: str) -> None:
    graph = parse(
        f"g (float[B,S,4] x) => (float[B,S,4] y) {{{body} y = Relu(i) }}",
        ratio=np.array(0.1, np.float32),
        training=np.array(False),
    )
    differential(graph, EliminateIdentity(), atol=0)  # exact
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %y = Relu(%x)
        CHECK-NOT: =
        """,
    )


@pytest.mark.parametrize(
    "body",
    [
        "i = Dropout(x, ratio, training)",
        "i = Dropout(x, ratio, flag)",  # who knows
        "i = Cast<to = 11>(x)",
        "t = Transpose(x) i = Transpose<perm = [2, 1, 0]>(t)",
        "r = RandomNormal<shape = [4]>() i = Add(x, r)",
        "i = Transpose(x)",  # the default reverses
        "i = Transpose<perm = [1, 0, 2]>(x)",
        "t = Transpose<perm = [1, 2, 0]>(x) i = Transpose<perm = [1, 2, 0]>(t)",
        "i = Concat<axis = 0>(x, x)",
        "i = Sum(x, x)",
    ],
)
def test_computes_something_and_stays(body: str) -> None:
    graph = parse(
        f"g (float[B,S,4] x, bool flag) => (int64 y) {{{body} y = Size(i) }}",
        ratio=np.array(0.1, np.float32),
        training=np.array(True),
    )
    before = dump(graph)
    ctx = run_pass(graph, EliminateIdentity())
    assert dump(graph) == before
    assert not ctx.skips


def test_a_dropout_whose_mask_is_read_stays() -> None:
    graph = parse(
        """g (float[B,S,4] x) => (float[B,S,4] y, bool[B,S,4] z) {
            i, mask = Dropout(x)
            y = Relu(i)
            z = Not(mask)
        }"""
    )
    run_pass(graph, EliminateIdentity())
    check(graph, "CHECK: %i, %mask = Dropout(%x)\nCHECK: %y = Relu(%i)")


def test_the_name_of_a_graph_output_moves_to_what_computes_it() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y, float[N,4] z) {
            r = Relu(x)
            y = Identity(r)
            z = Neg(y)
        }"""
    )
    differential(graph, EliminateIdentity(), atol=0)
    check(
        graph,
        """
        CHECK: -> (%y, %z)
        CHECK-NEXT: %y = Relu(%x)
        CHECK-NEXT: %z = Neg(%y)
        """,
    )


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity(x) z = Neg(x)",  # a graph input
        "y = Identity(w) z = Neg(x)",  # a constant
        "y = Neg(x) z = Identity(y)",  # another output
        "r = Neg(x) y = Identity(r) z = Exp(r)",  # read by others, who may be part of a fusion
    ],
)
def test_refuses_where_the_node_carries_an_output_name(body: str) -> None:
    graph = parse(f"g (float[4] x) => (float[4] y, float[4] z) {{{body}}}", w=normal(4))
    assert_refused(graph, EliminateIdentity(), "carries the name of a graph output")


def test_a_shared_initializer_takes_the_place_of_its_copies() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            v = Identity(w)
            a = Mul(x, w)
            y = Add(a, v)
        }""",
        w=normal(4),
    )
    differential(graph, EliminateIdentity(), atol=0)
    check(
        graph,
        """
        CHECK: %a = Mul(%x, @w:f32[4]#[[W:[0-9a-f]+]])
        CHECK: %y = Add(%a, @w:f32[4]#[[W]])
        """,
    )


def test_a_subgraph_goes_on_reading_the_name_it_knows() -> None:
    graph = parse(
        """g (bool c, float[N,4] x) => (float[N,4] y) {
            r = Relu(x)
            i = Identity(r)
            y = If (c) <
                then_branch = yes () => (float[N,4] p) { p = Neg(i) },
                else_branch = no () => (float[N,4] q) { q = Exp(i) }
            >
        }"""
    )
    feeds = [{"c": np.array(c), "x": normal(2, 4)} for c in (True, False)]
    differential(graph, EliminateIdentity(), atol=0, feeds=feeds)
    check(graph, "CHECK: %i = Relu(%x)")


def test_refuses_the_copy_of_an_input_that_a_subgraph_reads() -> None:
    graph = parse(
        """g (bool c, float[N,4] x) => (float[N,4] y) {
            i = Identity(x)
            y = If (c) <
                then_branch = yes () => (float[N,4] p) { p = Neg(i) },
                else_branch = no () => (float[N,4] q) { q = Exp(x) }
            >
        }"""
    )
    assert_refused(graph, EliminateIdentity(), "carries the name")


def test_dead_nodes_go_too() -> None:
    graph = parse("g (float[4] x) => (float[4] y) { d = Neg(x) y = Exp(x) }")
    differential(graph, EliminateIdentity(), atol=0)
    check(graph, "CHECK-NOT: Neg")
