"""A linear's bias goes into the GELU that reads the sum."""

from __future__ import annotations

import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.fusion.fuse_bias_gelu import FuseBiasGelu
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass

ATOL = 2e-6  # a dozen roundings of values up to 4


def ffn(body: str, outputs: str = "float[B,S,8] y") -> Graph:
    return parse(f"g (float[B,S,8] x) => ({outputs}) {{ {body} }}", 20, b=normal(8), r=normal(1, 8))


@pytest.mark.parametrize(
    ("gelu", "made"),
    [
        ("Gelu(a)", "BiasGelu"),
        ("com.microsoft.Gelu(a)", "BiasGelu"),
        ('Gelu<approximate = "tanh">(a)', "FastGelu"),
        ("com.microsoft.FastGelu(a)", "FastGelu"),
    ],
)
@pytest.mark.parametrize("add", ["a = Add(x, b)", "a = Add(b, x)"])
def test_both_forms(gelu: str, made: str, add: str) -> None:
    graph = ffn(f"{add} y = {gelu}")
    differential(graph, FuseBiasGelu(), atol=ATOL)
    check(graph, f"CHECK: %y = com.microsoft.{made}(%x, @b:f32[8]")


def test_refuses_a_sum_that_something_else_reads() -> None:
    graph = ffn("a = Add(x, b) y = Gelu(a) z = Neg(a)", "float[B,S,8] y, float[B,S,8] z")
    assert_refused(graph, FuseBiasGelu(), "the sum has other readers")


@pytest.mark.parametrize(
    "body",
    ["y = Gelu(x)", "a = Add(x, x) y = Gelu(a)", "a = Add(x, r) y = Gelu(a)",
     "y = com.microsoft.FastGelu(x, b)"],
)  # fmt: skip
def test_what_has_no_bias_is_left_alone(body: str) -> None:
    graph = ffn(body)
    before = [n.op for n in graph.nodes]
    assert not run_pass(graph, FuseBiasGelu()).skips
    assert [n.op for n in graph.nodes] == before
