"""Tensors between which values are only picked or placed get one range."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.transform.share_ranges import ShareRanges
from qcompile.planning import Context, Decision, Use
from qcompile.quant import QSpec, Range
from qcompile.rewriting.testing import context, parse, run_pass

U8 = QSpec("uint8", symmetric=False)
WIDE = QSpec("uint16", symmetric=False)


def chain() -> Graph:
    return parse(
        """g (float[1,2,8,8] x, float[1,2,4,4] k) => (float[1,4,4,4] y, float[1,2,4,4] z) {
            p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
            c = Concat<axis = 1>(p, k)
            y = Relu(c)
            z = Sigmoid(k)
        }"""
    )


def planned(graph: Graph, **ranges: tuple[float, float]) -> Context:
    ctx = context()
    for node in graph.nodes:
        for i, tensor in enumerate(node.inputs):
            if tensor.name in ranges:
                use = (Use(node.name, i),)
                ctx.plan.decide(Decision(tensor.name, "activation", U8, "", use))
    for name, (low, high) in ranges.items():
        ctx.ranges.set(name, Range(np.array(low), np.array(high)))
    return ctx


def spans(ctx: Context) -> dict[str, tuple[float, float]]:
    return {n: (float(s.lo), float(s.hi)) for n, s in ctx.ranges.found.items()}


def test_pool_and_concat_share_one_range() -> None:
    graph = chain()
    ctx = planned(graph, x=(-2, 4), p=(-1, 4), k=(0, 5), c=(-1, 5))
    run_pass(graph, ShareRanges(), ctx=ctx)
    assert set(spans(ctx).values()) == {(-2, 5)}


def test_a_range_that_would_grow_too_much_stays() -> None:
    graph = chain()
    ctx = planned(graph, x=(0, 4), p=(0, 4), k=(0, 0.5), c=(0, 4))
    run_pass(graph, ShareRanges(), ctx=ctx)
    assert spans(ctx) == {"x": (0, 4), "p": (0, 4), "k": (0, 0.5), "c": (0, 4)}
    assert [(s.node, "too few steps" in s.reason) for s in ctx.skips] == [("k", True)]


def test_other_integers_and_float_tensors_have_no_part() -> None:
    graph = chain()
    ctx = planned(graph, x=(-2, 4), p=(-1, 3), c=(-1, 5))
    ctx.plan.decisions[0] = Decision("x", "activation", WIDE, "", ctx.plan.decisions[0].uses)
    run_pass(graph, ShareRanges(), ctx=ctx)
    assert spans(ctx) == {"x": (-2, 4), "p": (-1, 5), "c": (-1, 5)}


def test_a_share_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="most is 0"):
        ShareRanges(most=0.5)
