"""Quantizers move in front of layout operators, which then move bytes instead of floats."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.fusion.hoist_quantize import HoistQuantize
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass

STATIC = "q = QuantizeLinear({}, s, z) y = DequantizeLinear(q, s, z)"
DYNAMIC = "q, s1, z1 = DynamicQuantizeLinear({}) y = DequantizeLinear(q, s1, z1)"
CHAIN = "r = Reshape(x, heads) t = Transpose<perm = [0, 2, 1, 3]>(r) "
FOUR = "float[B,2,S,4] y"


def quantized(body: str, outputs: str = FOUR, **changed: Array) -> Graph:
    weights: dict[str, Array] = {
        "s": np.array(0.05, np.float32),
        "z": np.array(128, np.uint8),
        "heads": np.array([0, 0, 2, 4]),
        "last": np.array([-1]),
        **changed,
    }
    return parse(f"g (float[B,S,8] x, bool c) => ({outputs}) {{ {body} }}", **weights)


def test_static_quantizer_moves_before_the_chain() -> None:
    graph = quantized(CHAIN + STATIC.format("t"))
    differential(graph, HoistQuantize(), atol=0)  # exact: moving and rounding values commute
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %q = QuantizeLinear(%x, @s:[[S:[^ ]+]], @z:[[Z:.+]])
        CHECK-NEXT: %r/quantized = Reshape(%q, @heads
        CHECK-NEXT: %t/quantized = Transpose(%r/quantized)
        CHECK-NEXT: %y = DequantizeLinear(%t/quantized, @s:[[S]], @z:[[Z]])
        """,
    )
    types = {t.name: np.dtype(t.dtype).name for t in graph.tensors().values()}
    moved = ("q", "r/quantized", "t/quantized")
    assert [types[n] for n in (*moved, "y")] == ["uint8"] * 3 + ["float32"]


def test_dynamic_quantizer_finds_the_same_range() -> None:
    graph = quantized(CHAIN + DYNAMIC.format("t"))
    differential(graph, HoistQuantize(), atol=0)
    check(
        graph,
        """
        CHECK: %q, %s1, %z1 = DynamicQuantizeLinear(%x)
        CHECK-NEXT: %r/quantized = Reshape(%q, @heads
        CHECK-NEXT: %t/quantized = Transpose(%r/quantized)
        CHECK-NEXT: %y = DequantizeLinear(%t/quantized, %s1, %z1)
        """,
    )


@pytest.mark.parametrize(
    ("mover", "out"),
    [
        ("Transpose<perm = [2, 0, 1]>(x)", "float[8,B,S] y"),
        ("Flatten(x)", "float[B,R] y"),
        ("Unsqueeze(x, last)", "float[B,S,8,1] y"),
    ],
)
def test_each_layout_operator(mover: str, out: str) -> None:
    graph = quantized(f"t = {mover} " + STATIC.format("t"), out)
    differential(graph, HoistQuantize(), atol=0)
    check(graph, "CHECK: %q = QuantizeLinear(%x,")


def test_a_quantizer_without_zero_point() -> None:
    graph = quantized(CHAIN + "q = QuantizeLinear(t, s) y = DequantizeLinear(q, s)")
    differential(graph, HoistQuantize(), atol=0)
    check(graph, "CHECK: %q = QuantizeLinear(%x, @s:{{[^,]+}})")


def test_several_readers_of_the_integers_follow() -> None:
    both = STATIC.format("t") + " z2 = DequantizeLinear(q, s, z)"
    graph = quantized(CHAIN + both, FOUR + ", float[B,2,S,4] z2")
    differential(graph, HoistQuantize(), atol=0)
    check(graph, "CHECK-DAG: %y = DequantizeLinear(%t/q\nCHECK-DAG: %z2 = DequantizeLinear(%t/q")


BRANCHES = """w = If (c) <
    then_branch = yes () => (float[B,2,S,4] p) { p = Neg(t) },
    else_branch = no () => (float[B,2,S,4] n) { n = Abs(t) }
>"""


@pytest.mark.parametrize(
    ("more", "output"),
    [("w = Neg(t)", "w"), ("", "t"), (BRANCHES, "w")],
    ids=["second reader", "graph output", "subgraph"],
)
def test_a_chain_that_is_read_elsewhere_stays(more: str, output: str) -> None:
    graph = quantized(CHAIN + STATIC.format("t") + more, f"{FOUR}, float[B,2,S,4] {output}")
    ctx = run_pass(graph, HoistQuantize())
    assert not ctx.skips
    check(graph, "CHECK: %q = QuantizeLinear(%t,")


@pytest.mark.parametrize(
    "maker", ["Relu(x)", "Softmax<axis = 1>(x)", "Expand(x, wide)", "Slice(x, last, last)"]
)
def test_other_operators_stay_in_front(maker: str) -> None:
    """Their results are other values, or other in number."""
    body = f"t = {maker} {DYNAMIC.format('t')} d = Identity(y)"
    graph = quantized(body, "float[B,S,8] d", wide=np.array([2, 1, 1]))
    ctx = run_pass(graph, HoistQuantize())
    assert not ctx.skips
    check(graph, "CHECK: %q, %s1, %z1 = DynamicQuantizeLinear(%t)")


def test_it_moves_as_far_as_nothing_else_reads() -> None:
    graph = quantized(CHAIN + STATIC.format("t"), FOUR + ", float[B,S,2,4] r")
    differential(graph, HoistQuantize(), atol=0)
    check(
        graph,
        """
        CHECK: %r = Reshape(%x,
        CHECK-NEXT: %q = QuantizeLinear(%r,
        CHECK-NEXT: %t/quantized = Transpose(%q)
        """,
    )


def test_a_constant_is_not_quantized_at_run_time_anew() -> None:
    """The chain ends where its source is a constant."""
    graph = quantized(
        "t = Transpose<perm = [1, 0]>(k) " + STATIC.format("t"), "float[4,3] y", k=normal(3, 4)
    )
    run_pass(graph, HoistQuantize())
    check(graph, "CHECK: %q = QuantizeLinear(%t,")


@pytest.mark.parametrize("axis", ["<axis = 1>", ""])
def test_refuses_scales_per_axis(axis: str) -> None:
    eight: dict[str, Array] = {"s": np.full(8, 0.05, np.float32), "z": np.zeros(8, np.uint8)}
    body = f"t = Transpose<perm = [0, 2, 1]>(x) q = QuantizeLinear{axis}(t, s, z) "
    graph = quantized(body + "y = Cast<to = 1>(q)", "float[B,8,S] y", **eight)
    assert_refused(graph, HoistQuantize(), "per axis")


def test_refuses_integers_that_are_a_graph_output() -> None:
    graph = quantized(CHAIN + STATIC.format("t"), FOUR + ", uint8[B,2,S,4] q")
    assert_refused(graph, HoistQuantize(), "it carries the name of a graph output")
