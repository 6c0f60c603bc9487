"""Groups of channels get scales of their own, few of them, around the widest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.lower.shield_groups import ShieldGroups
from qcompile.passes.plan.plan_interior import PlanInterior
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.group_scales import GroupScales
from qcompile.planning import Context
from qcompile.quant import Array, sqnr_db
from qcompile.rewriting.testing import assert_refused, context, normal, outputs, parse, run_pass
from tests.passes.corpus import calibrate

CHANNELS = 64


def data(outlier: float) -> Array:
    """Rows with one wide channel."""
    rows = normal(400, CHANNELS)
    rows[:, 3] *= np.float32(outlier)
    return rows


def product(opset: int = 17) -> Graph:
    text = "g (float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }"
    weight = normal(CHANNELS, 8, seed=1)
    weight[3] /= 100  # the wide channel says little: what it does to the others is what counts
    return parse(text, opset, w=weight)


def planned(graph: Graph, outlier: float, **choices: Any) -> Context:
    ctx = context("qdq", **choices)
    run_pass(graph, PlanOperands(), PlanInterior(), ctx=ctx)
    return calibrate(graph, ctx, GroupScales(), [{"x": data(outlier)}])


def scales(graph: Graph) -> Array:
    return array(graph.constants()["x/scale"])


def test_golden() -> None:
    graph = product()
    ctx = planned(graph, 100.0)
    run_pass(graph, GroupScales(), InsertQdq(), ctx=ctx)
    found = scales(graph)
    assert found.shape == (CHANNELS,)
    assert 2 <= len(np.unique(found)) <= 6
    assert found[3] == found.max() > 20 * np.median(found)
    assert all("groups of channels" in d.reason for d in ctx.plan.quantized("activation"))


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_equal_groups_as_in_the_paper(groups: int) -> None:
    graph = product()
    run_pass(graph, GroupScales(groups=groups), InsertQdq(), ctx=planned(graph, 100.0))
    values, sizes = np.unique(scales(graph), return_counts=True)
    assert len(values) == groups
    assert set(sizes) == {CHANNELS // groups}


def test_an_outlier_is_kept_from_the_others() -> None:
    """The outlier's step is 100 times too wide for the others: 40 dB, less the share of weights."""
    noise = []
    for items in ((), (GroupScales(),)):
        graph = product()
        run_pass(graph, *items, InsertQdq(), ShieldGroups(), ctx=planned(graph, 100.0))
        feed = {"x": data(100.0)}
        noise.append(sqnr_db(outputs(product(), feed)["y"], outputs(graph, feed)["y"]))
    assert noise[1] > noise[0] + 15


def test_channels_that_are_alike_keep_one_scale() -> None:
    rows = np.where(normal(400, CHANNELS) > 0, 1, -1).astype(np.float32)
    graph = product()
    ctx = context("qdq")
    run_pass(graph, PlanOperands(), PlanInterior(), ctx=ctx)
    calibrate(graph, ctx, GroupScales(), [{"x": rows}])
    assert_refused(graph, GroupScales(), "groups would not help: one scale", ctx)


def test_only_what_is_named_is_grouped() -> None:
    graph = product()
    ctx = planned(graph, 100.0)
    assert_refused(graph, GroupScales(only="h|role:ffn-in"), "no pattern of the option 'only'", ctx)
    assert list(GroupScales(only="h").wants(graph, ctx)) == []
    run_pass(graph, GroupScales(only="role:other | h"), InsertQdq(), ctx=ctx)
    assert scales(graph).shape == (CHANNELS,)


def test_what_was_not_sampled_keeps_one_scale() -> None:
    graph = product()
    ctx = planned(graph, 100.0)
    ctx.channels.clear()
    assert_refused(graph, GroupScales(), "its channels were not sampled: one scale", ctx)


def test_an_axis_of_unknown_size_keeps_one_scale() -> None:
    graph = parse("g (float[N,M] x) => (float[N,8] y) { y = MatMul(x, w) }", w=normal(CHANNELS, 8))
    ctx = context("qdq")
    run_pass(graph, PlanOperands(), PlanInterior(), ctx=ctx)
    assert_refused(graph, GroupScales(), "its last axis has no fixed size: one scale", ctx)


def test_sixteen_bits_keep_one_scale_over_the_foreseen_range() -> None:
    graph = product(opset=21)
    ctx = planned(graph, 100.0, precision=(("x", 16),))
    before = ctx.ranges.get("x")
    assert_refused(graph, GroupScales(), "16 bits are fine enough: one scale", ctx)
    after = ctx.ranges.get("x")
    assert before is not None and after is not None
    assert after.axis is None and after.hi > before.hi
