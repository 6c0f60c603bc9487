"""``permute-channels{pairs=true}``: hidden layers and values in an order that suits int8 scales."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.printer import dump
from qcompile.passes.transform.permute_channels import PermuteChannels
from qcompile.planning import Context, Decision, Use
from qcompile.quant import Array, ChannelStats
from qcompile.quant.weight_rounding import weight_params
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)
from qcompile.targets.cpu import ALONE, WEIGHT
from tests.passes.corpus import bert_layer
from tests.passes.transform.test_permute_channels import ATOL, feeds

PAIRS = PermuteChannels(pairs=True)


def planned(graph: Graph, bounded: bool = True) -> Context:
    """All weights of linear layers are int8."""
    ctx = context()
    for node in graph.nodes:
        weight = node.inputs[1] if node.op in ("MatMul", "Gemm") else None
        if weight is not None and weight.name in graph.constants():
            spec = replace(WEIGHT if bounded else ALONE, axis=0 if node.attrs.get("transB") else 1)
            ctx.plan.decide(Decision(weight.name, "weight", spec, "", (Use(node.name, 1),)))
    return ctx


def mlp(rows: tuple[float, ...] = (5, 4, -5, -4)) -> Graph:
    """A hidden layer whose second weight has these large rows."""
    v = normal(4, 3)
    v[:, 0] = rows
    return parse(
        """g (float[B,S,3] x) => (float[B,S,3] y) {
            m = MatMul(x, w)
            a = Add(m, b)
            r = Relu(a)
            y = MatMul(r, v)
        }""",
        w=normal(3, 4),
        b=normal(4),
        v=v,
    )


def noise(weight: Array) -> float:
    """The sum of squared scales, to which rounding noise is proportional."""
    return float(np.square(weight_params(weight, WEIGHT).scale, dtype=np.float64).sum())


def test_golden() -> None:
    graph = mlp()
    old = {n: array(t) for n, t in graph.constants().items()}
    ctx = planned(graph)
    ctx.channels["r"] = ChannelStats(np.zeros(4), np.arange(4.0), np.arange(4.0)[None])
    differential(graph, PAIRS, atol=ATOL, ctx=ctx)
    check(
        graph,
        """
        CHECK: %m = MatMul(%x, @w/permuted:f32[3,4]
        CHECK-NEXT: %a = Add(%m, @b/permuted:f32[4]
        CHECK-NEXT: %r = Relu(%a)
        CHECK-NEXT: %y = MatMul(%r, @v/permuted:f32[4,3]
        CHECK-NOT: =
        """,
    )
    order = ctx.channels["r"].hi.astype(int)
    found = {n: array(t) for n, t in graph.constants().items()}
    assert np.array_equal(found["w/permuted"], old["w"][:, order])
    assert np.array_equal(found["b/permuted"], old["b"][order])
    assert np.array_equal(found["v/permuted"], old["v"][order])
    assert noise(found["v/permuted"]) < noise(old["v"])
    assert [d.tensor for d in ctx.plan.quantized()] == ["w/permuted", "v/permuted"]


def test_the_weight_of_a_transposed_gemm() -> None:
    v = normal(3, 8)
    graph = parse(
        """g (float[B,3] x) => (float[B,3] y) {
            m = Gemm<transB = 1>(x, w, b)
            r = Relu(m)
            y = Gemm<transB = 1>(r, v)
        }""",
        w=normal(8, 3),
        b=normal(8),
        v=v,
    )
    differential(graph, PAIRS, atol=ATOL, ctx=planned(graph))
    assert noise(array(graph.constants()["v/permuted"]).T) < noise(v.T)


def gated() -> Graph:
    """Two linear layers write the hidden layer of a gated feed-forward block, one reads it."""
    return parse(
        """g (float[B,S,3] x) => (float[B,S,3] y) {
            g = MatMul(x, w) s = Sigmoid(g) u = MatMul(x, t) h = Mul(s, u) y = MatMul(h, v)
        }""",
        w=normal(3, 8),
        t=normal(3, 8, seed=1),
        v=normal(8, 3),
    )


def test_both_layers_that_write_a_gated_hidden_layer_follow() -> None:
    graph = gated()
    differential(graph, PAIRS, atol=ATOL, ctx=planned(graph))
    check(graph, "CHECK-DAG: @w/permuted\nCHECK-DAG: @t/permuted\nCHECK-DAG: @v/permuted")


def test_values_move_within_their_heads() -> None:
    """Two heads of four channels; queries and keys, which no weight reads, stay."""
    wo = normal(8, 5, seed=4)
    wo[:2, 0] = wo[4:6, 1] = 9  # in one pair
    heads = "Reshape({}, split) {} = Transpose<perm = [0, 2, 1, 3]>({})"
    graph = parse(
        f"""g (float[B,S,8] x) => (float[B,S,5] y) {{
            q = MatMul(x, wq) q4 = {heads.format("q", "qt", "q4")}
            k = MatMul(x, wk) k4 = Reshape(k, split) kt = Transpose<perm = [0, 2, 3, 1]>(k4)
            v = MatMul(x, wv) v4 = {heads.format("v", "vt", "v4")}
            s = MatMul(qt, kt) p = Softmax<axis = -1>(s) c = MatMul(p, vt)
            c4 = Transpose<perm = [0, 2, 1, 3]>(c) c3 = Reshape(c4, join) y = MatMul(c3, wo)
        }}""",
        split=np.array([0, 0, 2, 4]),
        join=np.array([0, 0, 8]),
        wq=normal(8, 8, seed=1),
        wk=normal(8, 8, seed=2),
        wv=normal(8, 8, seed=3),
        wo=wo,
    )
    differential(graph, PAIRS, atol=ATOL, ctx=planned(graph))
    new = array(graph.constants()["wo/permuted"])
    assert {"wq", "wk", "wv/permuted"} <= graph.constants().keys()
    for rows in (slice(0, 4), slice(4, 8)):
        assert sorted(new[rows, 0]) == sorted(wo[rows, 0])
    assert noise(new) < noise(wo)


def test_heads_of_an_odd_number_of_channels_keep_their_order() -> None:
    graph = bert_layer()
    ctx = run_pass(graph, PAIRS, ctx=planned(graph))
    assert "its blocks have 3 channels: pairs are in two blocks" in {s.reason for s in ctx.skips}
    assert "wo" in graph.constants()


def test_a_transformer_layer_computes_the_same() -> None:
    graph = bert_layer()
    differential(graph, PAIRS, atol=ATOL, feeds=feeds(graph), ctx=planned(graph))


def test_without_the_bound_nothing_changes() -> None:
    graph = mlp()
    before = dump(graph)
    assert run_pass(graph, PAIRS, ctx=planned(graph, bounded=False)).skips == []
    assert dump(graph) == before


def test_asks_for_no_statistics() -> None:
    graph = mlp()
    assert list(PAIRS.wants(graph, planned(graph))) == []


HIDDEN = "g (float[B,S,3] x, int64[1] last) => (float[B,S,D] y, float[B,S,3] z)"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("m = MatMul(x, w) y = Relu(m) z = MatMul(y, v)", "output 'y' would need a Gather"),
        (
            "m = MatMul(x, w) r = Relu(m) z = MatMul(r, v) y = MatMul(r, u)",
            "2 weights read it: the best order of each is another",
        ),
        ("m = MatMul(x, w) y = CumSum(m, last) z = MatMul(m, v)", "may mix its entries"),
    ],
)
def test_refuses(body: str, reason: str) -> None:
    weights = {"w": normal(3, 4), "v": normal(4, 3), "u": normal(4, 3, seed=1)}
    used = {n: v for n, v in weights.items() if f", {n})" in body}
    graph = parse(f"{HIDDEN} {{ {body} }}", **used)
    assert_refused(graph, PAIRS, reason, planned(graph))
