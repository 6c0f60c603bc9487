"""One product for each group, summed."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.lower.lower_linears import LowerLinears
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.split_groups import SplitGroups
from qcompile.planning import Context
from qcompile.quant import sqnr_db
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

ITEM = SplitGroups(groups=2, align=4)
DATA = normal(300, 8) * np.array([40, 30, 20, 10, 1, 1, 1, 1], np.float32)


def product(op: str = "MatMul") -> Graph:
    text = f"g (float[N,8] x, float[8,3] w) => (float[N,3] y) {{ y = {op}(x, w) }}"
    weight = normal(8, 3, seed=1)
    weight[:4] /= 40
    return parse(text, w=weight)


def planned(graph: Graph) -> Context:
    ctx = run_pass(graph, PlanOperands(), ctx=context())
    return calibrate(graph, ctx, ITEM, [{"x": DATA}])


def test_golden() -> None:
    graph = product()
    run_pass(graph, ITEM, ctx=planned(graph))
    check(
        graph,
        """
        CHECK: %x/channels_0_4 = Slice(%x
        CHECK: %x/channels_4_8 = Slice(%x
        CHECK: %y/0_4 = MatMul(%x/channels_0_4, @w/rows_0_4:f32[4,3]
        CHECK: %y/4_8 = MatMul(%x/channels_4_8, @w/rows_4_8:f32[4,3]
        CHECK: %y = Add(%y/0_4, %y/4_8)
        """,
    )


def test_the_float_graph_is_the_same() -> None:
    """Another order of 8 terms below 160 times 4: a few float32 roundings of their sum."""
    graph = product()
    run_pass(graph, ITEM, ctx=planned(graph))
    feed = {"x": DATA}
    expected = outputs(product(), feed)["y"]
    np.testing.assert_allclose(outputs(graph, feed)["y"], expected, atol=8 * 640 * 2**-23)


def test_each_group_has_its_own_scale_and_narrow_ones_profit() -> None:
    noise = []
    for items in ((), (ITEM,)):
        graph = product()
        ctx = planned(graph)
        run_pass(graph, *items, InsertQdq(), LowerLinears(), ctx=ctx)
        found = outputs(graph, {"x": DATA})["y"]
        noise.append(sqnr_db(outputs(product(), {"x": DATA})["y"], found))
    assert noise[1] > noise[0] + 6  # two steps for one: the coarse one no longer meets all rows


@pytest.mark.parametrize(
    ("item", "op", "reason"),
    [
        (SplitGroups(groups=2, align=64), "MatMul", "8 channels are too few for groups"),
        (ITEM, "Gemm", "a layer is a Gemm"),
    ],
)
def test_refusals(item: SplitGroups, op: str, reason: str) -> None:
    graph = product(op)
    assert_refused(graph, item, reason, planned(graph))


def test_a_weight_that_is_shared_with_other_data_is_refused() -> None:
    text = """g (float[N,8] x) => (float[N,3] y, float[N,3] z) {
        y = MatMul(x, w) n = Neg(x) z = MatMul(n, w)
    }"""
    graph = parse(text, w=normal(8, 3))
    assert_refused(graph, ITEM, "weight 'w' is shared by 2 nodes", planned(graph))


def test_what_was_not_sampled_is_refused() -> None:
    graph = product()
    ctx = planned(graph)
    ctx.channels.clear()
    assert_refused(graph, ITEM, "its channels were not sampled", ctx)
