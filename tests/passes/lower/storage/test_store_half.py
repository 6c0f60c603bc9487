"""Weights that stay float are written in the 16-bit type in which they came."""

from __future__ import annotations

import numpy as np

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.lower.storage.store_half import StoreHalf
from qcompile.planning import Context
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)


def halves() -> Context:
    """Of a model that came with weights in float16."""
    ctx = context()
    ctx.stored_as.add("float16")
    return ctx


def product(scale: float = 1, columns: int = 32) -> Graph:
    """Two products by one weight, which float16 holds before it is scaled."""
    values = normal(8, columns).astype(np.float16).astype(np.float32) * np.float32(scale)
    text = f"g (float[B,8] x, float[B,8] z) => (float[B,{columns}] y)"
    return parse(f"{text} {{ m = MatMul(x, w) n = MatMul(z, w) y = Add(m, n) }}", w=values)


def test_golden() -> None:
    graph = product()
    ctx = differential(graph, StoreHalf(), atol=1e-5, ctx=halves())
    check(
        graph,
        """
        CHECK: %w/float32 = Cast(@w/float16:f16[8,32]#{{.*}}) {to=1}
        CHECK: %m = MatMul(%x, %w/float32)
        CHECK: %n = MatMul(%z, %w/float32)
        """,
    )
    assert ctx.origins["w/float16"] == ("w", None)


def test_a_table_is_cast_after_the_lookup() -> None:
    graph = parse(
        "g (int64[B,S] i) => (float[B,S,16] y) { e = Gather(t, i) y = Relu(e) }",
        t=normal(32, 16).astype(np.float16).astype(np.float32),
    )
    feed = {"i": np.array([[0, 31, 4]])}
    differential(graph, StoreHalf(), atol=0, feeds=[feed], ctx=halves())
    check(
        graph,
        """
        CHECK: %e/rows = Gather(@t/float16:f16[32,16]#{{.*}}, %i)
        CHECK-NEXT: %e = Cast(%e/rows) {to=1}
        CHECK-NEXT: %y = Relu(%e)
        """,
    )


def test_refuses_values_that_do_not_fit() -> None:
    assert_refused(product(scale=1 / 3), StoreHalf(), "not all values of 'w' fit float16", halves())


def test_float32_models_and_small_constants_stay() -> None:
    for graph, ctx in ((product(), context()), (product(columns=4), halves())):
        before = dump(graph)
        run_pass(graph, StoreHalf(), ctx=ctx)
        assert dump(graph) == before


def test_vectors_of_quantized_operators_stay() -> None:
    ones = np.ones(512, np.float32)
    graph = parse(
        """g (uint8[B,8] x) => (float[B,512] y) {
            m = com.microsoft.MatMulIntegerToFloat(x, w, a, s, , , b)
            y = Add(m, b)
        }""",
        w=np.ones((8, 512), np.int8),
        a=np.array(1, np.float32),
        s=ones,
        b=ones,
    )
    before = dump(graph)
    run_pass(graph, StoreHalf(), ctx=halves())
    assert dump(graph) == before
