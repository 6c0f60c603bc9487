"""A residual sum goes into the normalization that reads it."""

from __future__ import annotations

import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.fusion.fuse_skip_layernorm import FuseSkipLayerNorm
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    differential,
    encoder,
    normal,
    parse,
    run_pass,
)

# Eight values of size 1 summed in another order, divided by a deviation near 1.
ATOL = 1e-5
NORM = "y = LayerNormalization<axis = -1, epsilon = 0.00001>(s, g, b)"


def block(body: str, outputs: str = "float[B,S,8] y", **changed: Array) -> Graph:
    values: dict[str, Array] = {
        "g": normal(8), "b": normal(8, seed=1), "w": normal(8, 8), "c": normal(8, seed=2), **changed
    }  # fmt: skip
    return parse(
        f"g (float[B,S,8] x, float[B,S,8] r, float[1,S,8] e) => ({outputs}) {{ {body} }}", **values
    )


def test_sum_bias_and_norm_become_one() -> None:
    graph = block(f"m = MatMul(x, w) a = Add(c, m) s = Add(a, r) {NORM}")
    differential(graph, FuseSkipLayerNorm(), atol=ATOL)
    check(
        graph,
        """
        CHECK: %m = MatMul(%x, @w
        CHECK-NEXT: %y = com.microsoft.SkipLayerNormalization(%m, %r, @g:f32[8]
        CHECK-SAME: @b:f32[8]{{[^,]*}}, @c:f32[8]
        CHECK-NOT: Add
        """,
    )


def test_without_bias_and_shift() -> None:
    graph = block("s = Add(x, r) y = LayerNormalization(s, g)")
    differential(graph, FuseSkipLayerNorm(), atol=ATOL)
    check(graph, "CHECK: %y = com.microsoft.SkipLayerNormalization(%x, %r, @g:f32[8]")


def test_a_sum_that_is_read_elsewhere_becomes_an_output() -> None:
    """The norm before a block: the stream goes on. Its name may be a graph output's."""
    body = f"m = MatMul(x, w) a = Add(m, c) s = Add(r, a) {NORM} z = Neg(s)"
    graph = block(body, "float[B,S,8] y, float[B,S,8] s, float[B,S,8] z")
    differential(graph, FuseSkipLayerNorm(), atol=ATOL)
    check(graph, "CHECK: %y, {{.*}}%s = com.microsoft.SkipLayerNormalization(%m, %r,")


def test_a_bias_whose_sum_is_read_elsewhere_stays_outside() -> None:
    graph = block(
        f"m = MatMul(x, w) a = Add(m, c) s = Add(a, r) {NORM} z = Neg(a)",
        "float[B,S,8] y, float[B,S,8] z",
    )
    differential(graph, FuseSkipLayerNorm(), atol=ATOL)
    check(graph, "CHECK: com.microsoft.SkipLayerNormalization(%a, %r,")


def test_shapes_may_be_known_by_the_attention_mask_alone() -> None:
    """Behind an operator that inference does not know, axes are followed from the mask."""
    graph = encoder(2)
    run_pass(graph, FuseSkipLayerNorm())
    assert [n.op for n in graph.nodes].count("SkipLayerNormalization") == 5


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"s = Add(x, e) {NORM}", "are not known to have the same shape"),
        (f"n = Neg(g) s = Add(x, r) {NORM.replace(' g,', ' n,')}", "not a constant vector"),
        ("s = Add(x, r) y = LayerNormalization<axis = 1>(s, k, k)", "not a constant vector"),
        ("s = Add(x, r) y, m = LayerNormalization(s, g, b) z = Neg(m)", "deviations is used"),
    ],
)  # fmt: skip
def test_refusals(body: str, reason: str) -> None:
    outputs = "float[B,S,8] y" + (", float[B,S,1] z" if "z = " in body else "")
    if " k, k" in body:
        body = "k = Identity(w) " + body
    assert_refused(block(body, outputs), FuseSkipLayerNorm(), reason)


def test_a_wide_bias_is_none() -> None:
    """A matrix added to all rows is no bias."""
    graph = block(f"a = Add(x, w) s = Add(a, r) {NORM}", w=normal(1, 8))
    differential(graph, FuseSkipLayerNorm(), atol=ATOL)
    check(graph, "CHECK: com.microsoft.SkipLayerNormalization(%a, %r,")
