"""Ranges are widened by what the tails of the sample foretell."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.widen_ranges import WidenRanges
from qcompile.planning import Context
from qcompile.quant import Array, ChannelStats, Range
from qcompile.rewriting import Pass
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)
from tests.passes.corpus import stats


def product() -> Graph:
    return parse("g (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", w=normal(4, 3))


def seen(graph: Graph, found: ChannelStats, span: tuple[float, float] | None = None) -> Context:
    """A plan, statistics of x and its range: their extrema, or as given."""
    ctx = run_pass(graph, PlanOperands(), ctx=context())
    ctx.channels["x"] = found
    low, high = span or (found.lo.min(), found.hi.max())
    ctx.ranges.set("x", Range(np.array(low), np.array(high)))
    return ctx


def pareto(exponent: float) -> Array:
    """Both signs, 400 rows of four channels; the last one never exceeds the rest."""
    rng = np.random.default_rng(0)
    data = rng.uniform(size=(400, 4)) ** -exponent * rng.choice([-1, 1], (400, 4))
    found: Array = data.astype(np.float32)
    return found


def ends(ctx: Context) -> tuple[float, float]:
    span = ctx.ranges.get("x")
    assert span is not None
    return float(span.lo), float(span.hi)


def test_golden() -> None:
    """The graph is left alone, and the quantizer gets the foreseen range."""
    graph, found = product(), stats(pareto(0.3))
    ctx = seen(graph, found)
    assert run_pass(graph, WidenRanges(doublings=4), ctx=ctx).skips == []
    check(graph, "CHECK: %y = MatMul(%x, @w:f32[4,3]")
    ahead = found.extrapolated(4)
    low, high = float(ahead.lo.min()), float(ahead.hi.max())
    np.testing.assert_allclose(ends(ctx), (low, high), rtol=1e-6)
    run_pass(graph, InsertQdq(), ctx=ctx)
    step = float(array(graph.constants()["x/scale"]))
    assert step == pytest.approx((high - low) / 255, rel=1e-6)


def test_ends_grow_by_the_channel_that_ends_up_the_widest() -> None:
    """Channel 0 is wide and hardly moves, channel 1 is a little narrower, with a long tail."""
    data = pareto(0.4)[:, :2]
    data[:, 0] = np.float32(1.2 * data[:, 1].max()) + normal(400) / 100
    found = stats(data)
    ctx = seen(product(), found)
    run_pass(product(), WidenRanges(doublings=8), ctx=ctx)  # of the same names
    ahead = found.extrapolated(8)
    assert ahead.hi[1] > ahead.hi[0] > found.hi[1]
    np.testing.assert_allclose(ends(ctx), (ahead.lo[1], ahead.hi[1]), rtol=1e-6)


def test_a_calibrated_range_is_widened_from_where_it_is() -> None:
    """Percentiles lie inside of the extrema; they grow by the same factor."""
    found = stats(pareto(0.3))
    ctx = seen(product(), found, (-1.0, 2.0))
    run_pass(product(), WidenRanges(doublings=4), ctx=ctx)
    ahead = found.extrapolated(4)
    growth = ahead.lo.min() / found.lo.min(), ahead.hi.max() / found.hi.max()
    np.testing.assert_allclose(ends(ctx), (-growth[0], 2 * growth[1]), rtol=1e-6)


@pytest.mark.parametrize("doublings", [0.0, 1.0, 6.0])
def test_more_doublings_widen_more(doublings: float) -> None:
    found = stats(pareto(0.3))
    ctx, more = seen(product(), found), seen(product(), found)
    run_pass(product(), WidenRanges(doublings), ctx=ctx)
    run_pass(product(), WidenRanges(doublings + 1), ctx=more)
    assert ends(more)[0] < ends(ctx)[0] <= found.lo.min()
    assert ends(more)[1] > ends(ctx)[1] >= found.hi.max()
    assert doublings > 0 or ends(ctx) == (found.lo.min(), found.hi.max())


@pytest.mark.parametrize("sign", [1, -1])
def test_data_of_one_sign_keeps_its_end_on_the_other_side(sign: int) -> None:
    """What is never below zero is not foreseen to be: an end at zero stays there."""
    data = np.abs(pareto(0.3)) * np.float32(sign)
    data[0] = 0
    ctx = seen(product(), stats(data))
    run_pass(product(), WidenRanges(doublings=4), ctx=ctx)
    low, high = ends(ctx)
    assert (low == 0 and high > data.max()) if sign > 0 else (high == 0 and low < data.min())


@pytest.mark.parametrize("value", [3.0, -3.0])
def test_ends_that_do_not_enclose_zero_stay_in_order(value: float) -> None:
    """Both ends positive, or both negative: each keeps its place or moves outwards from zero."""
    ctx = seen(product(), stats(normal(100, 4) / 10 + np.float32(value)))
    before = ends(ctx)
    run_pass(product(), WidenRanges(doublings=4), ctx=ctx)
    low, high = ends(ctx)
    assert low <= high
    assert (high > before[1]) if value > 0 else (low < before[0])


def test_a_constant_tensor_keeps_its_range() -> None:
    for value in (0, 5):
        ctx = seen(product(), stats(np.full((50, 4), value, np.float32)))
        run_pass(product(), WidenRanges(doublings=4), ctx=ctx)
        assert ends(ctx) == (value, value)


def test_unseen_data_is_clipped_less() -> None:
    """A range from 60 rows saturates on 4000 rows of the same kind; the wider one does not.

    Within it, answers err by half a step of the data and of the weights, four of each in a sum.
    """
    rng = np.random.default_rng(0)
    data = (rng.uniform(size=(4060, 4)) ** -0.25 * rng.choice([-1, 1], (4060, 4))).astype("f4")
    few, many = data[:60], {"x": data[60:]}
    errors = {}
    pipelines: dict[str, list[Pass]] = {
        "narrow": [InsertQdq()],
        "wide": [WidenRanges(8), InsertQdq()],
    }
    for name, items in pipelines.items():
        graph = product()
        expected = outputs(graph, many)["y"]
        ctx = run_pass(graph, *items, ctx=seen(graph, stats(few)))
        errors[name] = float(np.abs(outputs(graph, many)["y"] - expected).max())
        low, high = ends(ctx)
        column = np.abs(normal(4, 3)).sum(0).max()
        worst = np.abs(normal(4, 3)).max() / 127 / 2 * np.abs(data).sum(1).max()
        bound = (high - low) / 255 / 2 * column * 1.01 + worst
        inside = bool(low <= data.min() and data.max() <= high)
        assert inside == (name == "wide")
        assert (errors[name] <= bound) == inside
    assert errors["wide"] < errors["narrow"] / 4


def test_differential_with_quantizers() -> None:
    """[lo, hi] of normal data times at most 2, in 255 steps; |w| sums to less than 8 a column."""
    graph, data = product(), normal(100, 4)
    ctx = seen(graph, stats(data))
    step = 2 * (data.max() - data.min()) / 255
    atol = float(step / 2 * 8 + 4 * np.abs(data).max() * np.abs(normal(4, 3)).max() / 127 / 2)
    differential(
        graph, WidenRanges(doublings=4), InsertQdq(), atol=atol, feeds=[{"x": data}], ctx=ctx
    )


def test_refuses_what_was_not_sampled_or_has_no_range() -> None:
    ctx = seen(product(), stats(normal(9, 4)))
    del ctx.channels["x"]
    assert_refused(product(), WidenRanges(doublings=4), "channels were not sampled", ctx)
    ctx = seen(product(), stats(normal(9, 4)))
    ctx.ranges.drop("x")
    assert_refused(product(), WidenRanges(doublings=4), "the range stays as it is", ctx)
    assert ctx.ranges.get("x") is None


def test_asks_for_what_linear_layers_read() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = MatMul(x, w) b = MatMul(x, w) s = Add(a, b) y = MatMul(s, w)
        }""",
        w=normal(4, 4),
    )
    ctx = run_pass(graph, PlanOperands(), ctx=context())
    assert list(WidenRanges(doublings=4).wants(graph, ctx)) == ["x", "s"]
