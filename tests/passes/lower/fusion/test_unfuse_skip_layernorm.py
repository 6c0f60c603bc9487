"""LayerNormalization takes its parameters as rows, which ONNX Runtime does not fuse with Add."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.fusion.unfuse_skip_layernorm import UnfuseSkipLayerNorm
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)
from qcompile.runtime.session import optimized_ops

NORM = "y = LayerNormalization<axis = -1, epsilon = 0.00001>(a, g, b)"


def residual(
    body: str, x: str = "float[B,S,8] x", outputs: str = "float[B,S,8] y", **changed: Array
) -> Graph:
    weights: dict[str, Array] = {"g": normal(8), "b": normal(8, seed=1), **changed}
    return parse(
        f"g ({x}, {x.replace(' x', ' r')}, bool c) => ({outputs}) {{ a = Add(x, r) {body} }}",
        **weights,
    )


@pytest.mark.parametrize("x", ["float[B,S,8] x", "float[N,8] x"])
def test_parameters_become_rows(x: str) -> None:
    """Bit-equal: the kernel reads the same eight values."""
    graph = residual(NORM, x, x.replace(" x", " y"))
    differential(graph, UnfuseSkipLayerNorm(), atol=0)
    check(
        graph,
        """
        CHECK: %a = Add(%x, %r)
        CHECK-NEXT: %y = LayerNormalization(%a, @g/row:f32[1,8]{{[^ ]+}}, @b/row:f32[1,8]
        """,
    )


def test_a_shift_may_be_omitted() -> None:
    graph = residual("y = LayerNormalization(a, g)")
    differential(graph, UnfuseSkipLayerNorm(), atol=0)
    check(graph, "CHECK: %y = LayerNormalization(%a, @g/row:f32[1,8]{{[^,]+}}){{$}}")
    graph = residual("y = LayerNormalization(a, g, )")
    differential(graph, UnfuseSkipLayerNorm(), atol=0)


def test_shared_parameters_keep_their_other_readers() -> None:
    graph = residual("n = LayerNormalization(a, g, b) m = Mul(n, g) y = Add(m, b)")
    differential(graph, UnfuseSkipLayerNorm(), atol=0)
    check(
        graph,
        """
        CHECK: %n = LayerNormalization(%a, @g/row:f32[1,8]{{[^,]+}}, @b/row:f32[1,8]
        CHECK: %m = Mul(%n, @g:f32[8]
        CHECK: %y = Add(%m, @b:f32[8]
        """,
    )


def test_the_sum_and_the_result_may_be_read_anywhere() -> None:
    """A graph output in the middle, and a subgraph that reads result and scale."""
    branches = """z = If (c) <
        then_branch = yes () => (float[B,S,8] p) { p = Mul(y, g) },
        else_branch = no () => (float[B,S,8] q) { q = Add(y, g) }
    >"""
    outputs = "float[B,S,8] y, float[B,S,8] a, float[B,S,8] z"
    graph = residual(f"{NORM} {branches}", outputs=outputs)
    rows = {"x": normal(1, 3, 8), "r": normal(1, 3, 8, seed=1)}
    feeds = [{**rows, "c": np.array(c)} for c in (True, False)]
    differential(graph, UnfuseSkipLayerNorm(), atol=0, feeds=feeds)
    check(graph, "CHECK: %y = LayerNormalization(%a, @g/row:f32[1,8]")


def test_the_runtime_fuses_without_and_not_with() -> None:
    """The first half shows that the second one checks something."""
    graph = residual(NORM)
    assert optimized_ops(serialize(graph)) == {"com.microsoft.SkipLayerNormalization": 1}
    run_pass(graph, UnfuseSkipLayerNorm())
    assert optimized_ops(serialize(graph)) == {"Add": 1, "LayerNormalization": 1}


@pytest.mark.parametrize("computed", ["n = Neg(g) y = LayerNormalization(a, n, b)",
                                      "n = Neg(b) y = LayerNormalization(a, g, n)"])  # fmt: skip
def test_refuses_computed_parameters(computed: str) -> None:
    assert_refused(residual(computed), UnfuseSkipLayerNorm(), "scale or bias is not constant")


def test_refuses_a_vector_since_a_row_does_not_broadcast_to_it() -> None:
    graph = residual(NORM, "float[8] x", "float[8] y")
    assert_refused(graph, UnfuseSkipLayerNorm(), "the data is a vector")


def test_rows_are_left_alone() -> None:
    graph = residual(NORM, g=normal(1, 8), b=normal(1, 8))
    ctx = run_pass(graph, UnfuseSkipLayerNorm(), ctx=context())
    assert not ctx.skips
    check(graph, "CHECK: %y = LayerNormalization(%a, @g:f32[1,8]{{[^ ]+}}, @b:f32[1,8]")
