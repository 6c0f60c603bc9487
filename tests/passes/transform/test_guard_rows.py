"""What a normalization reads stays float where one scale would blur small rows."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.transform.guard_rows import GuardRows
from qcompile.planning import Context, Decision, uses_of
from qcompile.quant import Array, ChannelStats, QSpec, Range, sqnr_db
from qcompile.rewriting.testing import context, filecheck, normal, parse, plan_text, run_pass
from qcompile.rewriting.testing import outputs as run

U8 = QSpec("uint8", symmetric=False)
CHANNELS = 64
NORM = "y = LayerNormalization(x, gamma)"


def graph_of(nodes: str = NORM) -> Graph:
    return parse(
        f"g (float[B,S,{CHANNELS}] x) => (float[B,S,{CHANNELS}] y) {{ {nodes} }}",
        18,
        gamma=np.ones(CHANNELS, np.float32),
        two=np.array(2, np.float32),
        last=np.array([-1]),
        eps=np.array(1e-6, np.float32),
    )


def rows(smallest: float) -> Array:
    """Four normal rows of size 1, and one that is smaller."""
    found = normal(5, CHANNELS)
    found[3] *= smallest
    return found


def planned(
    graph: Graph, seen: Array, target: str = "qdq", outlier: float = 0.0, spec: QSpec = U8
) -> Context:
    """x is to be quantized; an outlier has a scale of its own."""
    ctx = context(target)
    ctx.plan.decide(Decision("x", "activation", spec, "planned", uses_of(graph.tensors()["x"])))
    lo, hi = seen.min(0), seen.max(0)
    ctx.channels["x"] = ChannelStats(lo, hi, seen)
    span = Range(lo.min(), hi.max())
    if outlier:
        ends = np.full(CHANNELS, float(hi.max()))
        ends[0] = outlier
        span = Range(-ends, ends, -1)
    ctx.ranges.set("x", span)
    return ctx


def is_float(ctx: Context) -> bool:
    return [d.spec for d in ctx.plan.decisions] == [None]


@pytest.mark.parametrize(
    ("smallest", "refused"),
    [
        (0.1, False),  # the range of 5.7 has steps of .022, which is .0065 of noise: 24 dB
        (0.05, True),
        (0.0, False),  # zeros are exact
    ],
)
def test_rows_far_smaller_than_the_largest_are_refused(smallest: float, refused: bool) -> None:
    graph = graph_of()
    before = dump(graph)
    ctx = run_pass(graph, GuardRows(), ctx=planned(graph, rows(smallest)))
    assert is_float(ctx) == refused and dump(graph) == before
    assert [s.node for s in ctx.skips] == (["x"] if refused else [])


def test_the_reason_says_what_is_left_of_the_row() -> None:
    graph = graph_of()
    ctx = run_pass(graph, GuardRows(), ctx=planned(graph, rows(0.05)))
    filecheck(
        plan_text(ctx),
        "CHECK: activation x: float at LayerNormalization:y.0 because a normalization reads it: "
        "its scales would leave {{1[0-9.]*}} dB SQNR of its smallest row, 20 are required",
    )


@pytest.mark.parametrize(
    ("nodes", "refused"),
    [
        ("y = Neg(x)", False),
        ("t = Reshape(x, last3) y = LayerNormalization(t, gamma)", True),
        ("q = Mul(x, x) m = ReduceMean(q, last) r = Sqrt(m) y = Div(x, r)", True),
        ("n = ReduceL2(x, last) c = Max(n, eps) y = Div(x, c)", True),
        ("n = ReduceSum(x, last) y = Mul(x, n)", False),
    ],
)
def test_only_normalizations_divide_rows_by_their_size(nodes: str, refused: bool) -> None:
    graph = parse(
        f"g (float[B,S,{CHANNELS}] x) => (float[B,S,{CHANNELS}] y) {{ {nodes} }}",
        18,
        gamma=np.ones(CHANNELS, np.float32),
        last=np.array([-1]),
        last3=np.array([0, 0, CHANNELS]),
        eps=np.array(1e-6, np.float32),
    )
    assert is_float(run_pass(graph, GuardRows(), ctx=planned(graph, rows(0.05)))) == refused


def test_a_scale_of_its_own_keeps_an_outlier_from_the_others() -> None:
    graph = graph_of()
    assert not is_float(run_pass(graph, GuardRows(), ctx=planned(graph, rows(0.3), outlier=5.0)))
    wide = planned(graph, rows(0.3))
    wide.ranges.set("x", Range(np.array(-60.0), np.array(60.0)))
    assert is_float(run_pass(graph, GuardRows(), ctx=wide))


def test_what_is_fine_enough_or_not_quantized_alone_is_left() -> None:
    graph, wide = graph_of(), QSpec("uint16", symmetric=False)
    assert not is_float(run_pass(graph, GuardRows(), ctx=planned(graph, rows(0.05), spec=wide)))
    assert not is_float(run_pass(graph, GuardRows(), ctx=planned(graph, rows(0.05), "cpu")))
    unseen = planned(graph, rows(0.05))
    unseen.channels.clear()
    assert not is_float(run_pass(graph, GuardRows(), ctx=unseen))
    asked = GuardRows(least_sqnr=10)
    assert not is_float(run_pass(graph, asked, ctx=planned(graph, rows(0.05))))


def test_small_rows_survive() -> None:
    """The prediction holds: the small row keeps less than 20 dB with the scale of the others."""
    found = []
    for guards in ([], [GuardRows()]):
        graph, seen = graph_of(), rows(0.05)
        expected = run(graph, {"x": seen[None]})["y"][0, 3]
        ctx = run_pass(graph, *guards, ctx=planned(graph, seen))
        if not guards:
            run_pass(graph, InsertQdq(), ctx=ctx)
        found.append(sqnr_db(expected, run(graph, {"x": seen[None]})["y"][0, 3]))
    assert found[0] < 20 < 60 < found[1]
