"""The mean error of quantized products goes into their biases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcompile.ir import Graph
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.correct_bias import CorrectBias
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    normal,
    outputs,
    parse,
    run_pass,
)
from tests.passes.corpus import calibrate

# Far from zero mean, so that the weights' errors add up to a shift.
DATA = normal(400, 16) + 5
TEXT = """g (float[N,16] x, float[16,4] w, float[4] b) => (float[N,4] y)
{ p = MatMul(x, w)  y = Add(p, b) }"""


def biased() -> Graph:
    return parse(TEXT, w=normal(16, 4, seed=1), b=normal(4, seed=2))


def planned(graph: Graph) -> Context:
    ctx = run_pass(graph, PlanOperands(), ctx=context())
    return calibrate(graph, ctx, CorrectBias(), [{"x": DATA}])


def shift(graph: Graph) -> Array:
    """Mean error of each output on the data."""
    found, exact = (outputs(g, {"x": DATA})["y"] for g in (graph, biased()))
    mean: Array = (found - exact).mean(0)
    return mean


def test_golden() -> None:
    graph = biased()
    run_pass(graph, CorrectBias(), ctx=planned(graph))
    check(graph, "CHECK: %y = Add(%p, @b/shifted:f32[4]")


def test_the_mean_error_is_gone() -> None:
    """What is left is float32 rounding of means of values below 400."""
    plain, corrected = biased(), biased()
    run_pass(plain, InsertQdq(), ctx=planned(plain))
    run_pass(corrected, CorrectBias(), InsertQdq(), ctx=planned(corrected))
    assert np.abs(shift(plain)).max() > 1e-2
    assert np.abs(shift(corrected)).max() < 400 * 2**-20


def test_what_was_not_sampled_keeps_its_bias() -> None:
    graph = biased()
    ctx = planned(graph)
    ctx.channels.clear()
    assert_refused(graph, CorrectBias(), "its sample or its range is missing", ctx)


def test_the_mean_of_all_rows_counts_where_it_is_known() -> None:
    """A sample of half the mean leaves half of the weights' shift; the mean of all rows, none."""
    shifts = []
    for mean in (None, DATA.mean(0)):
        graph = biased()
        ctx = planned(graph)
        stats = ctx.channels["x"]
        ctx.channels["x"] = replace(stats, rows=stats.rows / 2, mean=mean)
        run_pass(graph, CorrectBias(), InsertQdq(), ctx=ctx)
        shifts.append(np.abs(shift(graph)).max())
    from_sample, from_all = shifts
    # What is left is the mean rounding error of the data, which halved rows have otherwise.
    assert from_all < from_sample / 3
