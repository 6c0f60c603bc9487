"""Ranges of the branches of joined tensors are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.plan.plan_joins import PlanJoins
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.planning import Context
from qcompile.quant import Range
from qcompile.rewriting.testing import context, normal, parse, run_pass


def graph_of(joined: str = "c = Concat<axis = -1>(a, s)") -> Graph:
    text = f"""g (float[N,4] a) => (float[N,3] y) {{ s = Sigmoid(a) {joined} y = MatMul(c, w) }}"""
    return parse(text, w=normal(8, 3))


def asked(graph: Graph, ctx: Context) -> list[str]:
    before = dump(graph)
    run_pass(graph, PlanOperands(), PlanJoins(), ctx=ctx)
    assert dump(graph) == before
    return [r.tensor for r in ctx.requests]


def test_branches_are_asked_for_once() -> None:
    assert asked(graph_of(), context()) == ["c", "a", "s"]


def test_what_has_a_range_already_is_not() -> None:
    ctx = context()
    ctx.ranges.set("s", Range(np.array(0), np.array(1)))
    assert asked(graph_of(), ctx) == ["c", "a"]


@pytest.mark.parametrize("mode", ["dynamic", "weight-only", "float"])
def test_other_modes_need_no_ranges(mode: str) -> None:
    assert asked(graph_of(), context(mode=mode)) == []


def test_what_joins_nothing_asks_for_nothing_more() -> None:
    graph = parse("g (float[N,8] c) => (float[N,3] y) { y = MatMul(c, w) }", w=normal(8, 3))
    assert asked(graph, context()) == ["c"]
