"""Weights are rounded by the error of the products they are for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.lower.lower_linears import LowerLinears
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.round_weights import RoundWeights
from qcompile.planning import Context
from qcompile.quant import Array, QSpec, real
from qcompile.quant.rounding import nearest
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
from qcompile.runtime.evaluation.int16_saturation import bound, linears
from qcompile.targets.cpu import WEIGHT
from tests.passes.corpus import calibrate, stats

CHANNELS = 32
# Eight sources make 32 channels, so rows are far from independent.
SOURCES = normal(8, CHANNELS)
DATA = normal(400, 8, seed=1) @ SOURCES + np.float32(0.1) * normal(400, CHANNELS, seed=2)
ONE = "g (float[N,32] x, float[32,8] w) => (float[N,8] y) { y = MatMul(x, w) }"


def product() -> Graph:
    return parse(ONE, w=normal(CHANNELS, 8))


def planned(graph: Graph, mode: str = "static") -> Context:
    """A plan, with ranges and samples of all that linear layers read on the data."""
    ctx = run_pass(graph, PlanOperands(), ctx=context(mode=mode))
    return calibrate(graph, ctx, RoundWeights(), [{"x": DATA}])


def off(graph: Graph, expected: Array, data: Array) -> float:
    """Norm of the error of y."""
    return float(np.linalg.norm(outputs(graph, {"x": data})["y"] - expected))


def test_golden() -> None:
    """The graph is left alone; insert-qdq takes the integers, of the same scales."""
    graph = product()
    ctx = planned(graph)
    assert run_pass(graph, RoundWeights(), ctx=ctx).skips == []
    check(graph, "CHECK: %y = MatMul(%x, @w:f32[32,8]")
    run_pass(graph, InsertQdq(), ctx=ctx)
    check(
        graph,
        """
        CHECK: %w/dequantized = DequantizeLinear(@w/int8:i8[32,8]{{.*}}, @w/scale:f32[8]
        CHECK: %y = MatMul(%x/dequantized, %w/dequantized)
        """,
    )
    found, plain = graph.constants(), nearest(normal(CHANNELS, 8), WEIGHT)
    np.testing.assert_array_equal(array(found["w/scale"]), plain.params.scale)
    np.testing.assert_array_equal(array(found["w/int8"]), ctx.rounded["w"].values)
    assert not np.array_equal(array(found["w/int8"]), plain.values)


@pytest.mark.parametrize("damping", [1.0, 0.05])
def test_the_product_errs_less(damping: float) -> None:
    """On data of the same kind that was not seen. Data stays float here: weights alone err."""
    unseen = normal(200, 8, seed=5) @ SOURCES + np.float32(0.1) * normal(200, CHANNELS, seed=6)
    errors = []
    for items in ([InsertQdq()], [RoundWeights(damping), InsertQdq()]):
        graph = product()
        expected = outputs(graph, {"x": unseen})["y"]
        ctx = planned(graph)
        ctx.plan.decisions[:] = [d for d in ctx.plan.decisions if d.kind == "weight"]
        ctx.channels["x"] = stats(DATA)
        run_pass(graph, *items, ctx=ctx)
        errors.append(off(graph, expected, unseen))
    assert errors[1] < 0.8 * errors[0]


def test_differential() -> None:
    """Data in 255 steps of its range, rounded by half of one. Carried errors add up over the rows:
    a weight moves by at most four of its own steps here, as is checked."""
    graph, w = product(), normal(CHANNELS, 8)
    ctx = planned(graph)
    move = np.abs(w).max(0) / 127 * 4
    step = float(DATA.max() - DATA.min()) / 255
    atol = step / 2 * np.abs(w).sum(0).max() + (move * np.abs(DATA).sum(1).max()).max()
    differential(graph, RoundWeights(), InsertQdq(), atol=float(atol), feeds=[{"x": DATA}], ctx=ctx)
    assert (np.abs(real(ctx.rounded["w"]) - w) <= move).all()


def test_all_weights_of_a_site_and_shared_ones_once() -> None:
    graph = parse(
        """g (float[N,32] x) => (float[N,32] y) {
            a = MatMul(x, q) b = MatMul(x, k) c = Add(a, b) y = MatMul(c, q)
        }""",
        q=normal(CHANNELS, CHANNELS),
        k=normal(CHANNELS, CHANNELS, seed=1),
    )
    ctx = planned(graph)
    assert list(RoundWeights().wants(graph, ctx)) == ["x", "c"]
    del ctx.channels["c"]
    run_pass(graph, RoundWeights(), ctx=ctx)
    first = ctx.rounded["q"]
    ctx.channels["c"] = stats(DATA[:50] ** 2)
    run_pass(graph, RoundWeights(), ctx=ctx)
    assert sorted(ctx.rounded) == ["k", "q"]
    assert ctx.rounded["q"] is first


def test_a_row_counts_by_its_direction() -> None:
    """What follows is normalized: a hundredfold row asks for the same integers."""
    rounded = []
    for factor in (1, 100):
        data = DATA.copy()
        data[::3] *= np.float32(factor)
        graph = product()
        ctx = planned(graph)
        ctx.channels["x"] = stats(data)
        run_pass(graph, RoundWeights(0.05), ctx=ctx)
        rounded.append(ctx.rounded["w"].values.astype(int))
    assert (rounded[0] != rounded[1]).mean() < 0.01  # ties, by the last bit of a moment


def test_rows_of_zeros_count_nothing() -> None:
    graph = product()
    ctx = planned(graph)
    ctx.channels["x"] = stats(np.zeros((9, CHANNELS), np.float32))
    run_pass(graph, RoundWeights(), ctx=ctx)
    plain = nearest(normal(CHANNELS, 8), WEIGHT)
    np.testing.assert_array_equal(ctx.rounded["w"].values, plain.values)


def test_moments_of_all_rows_count_where_they_were_added_up() -> None:
    """The same integers as with all rows in the sample; a row's own moment is that of its unit."""
    unit = DATA / np.linalg.norm(DATA, axis=1, keepdims=True)
    chosen = [stats(DATA), replace(stats(DATA[:40]), moments=unit.T @ unit), stats(DATA[:40])]
    rounded = []
    for found in chosen:
        graph = product()
        ctx = planned(graph)
        ctx.channels["x"] = found
        run_pass(graph, RoundWeights(0.05), ctx=ctx)
        rounded.append(ctx.rounded["w"].values)
    np.testing.assert_array_equal(rounded[0], rounded[1])
    assert not np.array_equal(rounded[0], rounded[2])


def test_moments_are_wanted_for_weights_of_few_bits_only() -> None:
    graph = parse(
        """g (float[N,32] x) => (float[N,8] y) {
            a = MatMul(x, q) b = MatMul(x, k) c = Add(a, b) y = MatMul(c, w)
        }""",
        q=normal(CHANNELS, CHANNELS),
        k=normal(CHANNELS, CHANNELS, seed=1),
        w=normal(CHANNELS, 8),
    )
    ctx = planned(graph)
    assert list(RoundWeights().wants_moments(graph, ctx)) == []
    decision = next(d for d in ctx.plan.quantized("weight") if d.tensor == "k")
    ctx.plan.replace(decision, spec=QSpec("int8", True, "channel", 1, width=4), reason="few")
    assert list(RoundWeights().wants_moments(graph, ctx)) == ["x"]
    assert list(RoundWeights(max_inputs=31).wants_moments(graph, ctx)) == []  # it would refuse


def test_refuses_what_was_not_sampled() -> None:
    graph = product()
    ctx = planned(graph)
    ctx.channels.clear()
    assert_refused(graph, RoundWeights(), "its rows were not sampled", ctx)
    assert ctx.rounded == {}


def test_refuses_long_weights() -> None:
    graph = product()
    ctx = planned(graph)
    assert_refused(graph, RoundWeights(max_inputs=31), "more than 31 channels", ctx)
    assert ctx.rounded == {}
    run_pass(graph, RoundWeights(max_inputs=32), ctx=ctx)
    assert list(ctx.rounded) == ["w"]


def test_refuses_a_transposed_weight() -> None:
    text = "g (float[N,32] x, float[8,32] w) => (float[N,8] y) { y = Gemm<transB = 1>(x, w, ) }"
    graph = parse(text, w=normal(8, CHANNELS))
    ctx = planned(graph)
    assert_refused(graph, RoundWeights(), "the weight is transposed", ctx)
    assert ctx.rounded == {}


def test_a_weight_that_is_read_along_both_axes_has_integers_for_each() -> None:
    """Those chosen for the MatMul's columns are not the Gemm's, whose channels are its rows."""
    square = normal(16, 16)
    graph = parse(
        "g (float[N,16] x) => (float[N,16] y) { h = MatMul(x, w) y = Gemm<transB = 1>(h, w) }",
        w=square,
    )
    x = normal(64, 16, seed=1)
    before = outputs(graph, {"x": x})["y"]
    ctx = run_pass(graph, PlanOperands())
    ctx = calibrate(graph, ctx, RoundWeights(), [{"x": x}])
    run_pass(graph, RoundWeights(), InsertQdq(), LowerLinears(), ctx=ctx)
    after = outputs(graph, {"x": x})["y"]
    # Two layers of 8 bits: a hundredth each of what they put out, in the root of the mean square.
    assert np.linalg.norm(after - before) < 0.03 * np.linalg.norm(before)
    assert all(bound(linear).can == 0 for linear in linears(to_proto(graph)))
