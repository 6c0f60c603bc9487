"""Transforms of weights of few bits: rounding by moments, and whole factors of rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.migrate_scales import MigrateScales
from qcompile.passes.transform.round_weights import METHODS, RoundWeights
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.quant.rounding import nearest
from qcompile.rewriting.testing import context, normal, outputs, parse, run_pass
from tests.passes.corpus import calibrate

CHANNELS = 32
SOURCES = normal(8, CHANNELS)
DATA = normal(400, 8, seed=1) @ SOURCES + np.float32(0.1) * normal(400, CHANNELS, seed=2)
ONE = "g (float[N,32] x, float[32,8] w) => (float[N,8] y) { y = MatMul(x, w) }"


def planned(
    width: int, block: int | None, data: Array, *items: MigrateScales | RoundWeights
) -> tuple[Graph, Context]:
    graph = parse(ONE, w=normal(CHANNELS, 8))
    ctx = run_pass(graph, PlanOperands(), ctx=context())
    for decision in list(ctx.plan.quantized("weight")):
        assert decision.spec is not None
        few = replace(decision.spec, width=width, block=block, paired=False, narrow=False)
        ctx.plan.replace(decision, spec=few)
    for item in items:
        calibrate(graph, ctx, item, [{"x": data}])
        run_pass(graph, item, ctx=ctx)
    return graph, ctx


def integers(graph: Graph, ctx: Context) -> Array:
    run_pass(graph, InsertQdq(), ctx=ctx)
    name = next(n for n in graph.constants() if n.endswith("/int8"))
    return array(graph.constants()[name])


@pytest.mark.parametrize(("width", "block"), [(4, None), (4, 16), (3, 16)])
def test_outputs_err_less_than_with_nearest(width: int, block: int | None) -> None:
    unseen = normal(200, 8, seed=5) @ SOURCES + np.float32(0.1) * normal(200, CHANNELS, seed=6)
    errors = []
    for items in ([], [RoundWeights()]):
        graph, ctx = planned(width, block, DATA, *items)
        expected = outputs(graph, {"x": unseen})["y"]
        ctx.plan.drop_activations()
        run_pass(graph, InsertQdq(), ctx=ctx)
        errors.append(np.linalg.norm(outputs(graph, {"x": unseen})["y"] - expected))
    assert errors[1] < 0.7 * errors[0]


def test_wide_channels_get_whole_factors() -> None:
    """The integers of a row are multiplied, those of the others are as without factors."""
    wide = DATA.copy()
    wide[:, 5] *= 40
    migrate = MigrateScales(least_error=0, least_gain=1.0)
    graph, ctx = planned(4, None, wide, migrate)
    (factors,) = ctx.row_factors.values()
    assert factors[5] == 4
    assert set(np.unique(factors)) <= {1, 2, 4}
    run_pass(graph, RoundWeights(), ctx=ctx)
    found = integers(graph, ctx).astype(int)
    assert np.abs(found).max() <= 64
    assert (found % factors[:, None] == 0).all()
    codes = found // factors[:, None]
    assert (np.abs(codes) <= 8).all()


def test_seven_bits_have_no_room_for_factors() -> None:
    wide = DATA.copy()
    wide[:, 5] *= 40
    _, ctx = planned(7, None, wide, MigrateScales(least_error=0, least_gain=1.0))
    assert not ctx.row_factors
    assert "no room for factors" in ctx.skips[-1].reason


def test_without_a_sample_few_bits_are_nearest() -> None:
    graph, ctx = planned(4, 16, DATA, MigrateScales(least_gain=1e9))
    spec = next(d.spec for d in ctx.plan.quantized("weight"))
    assert spec is not None
    np.testing.assert_array_equal(integers(graph, ctx), nearest(normal(CHANNELS, 8), spec).values)


def test_adaround_is_a_method() -> None:
    found = []
    for method in METHODS:
        graph, ctx = planned(3, 16, DATA, RoundWeights(method=method))
        found.append(integers(graph, ctx))
    assert not np.array_equal(found[0], found[1])


def test_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="expected descent or adaround"):
        RoundWeights(method="luck")
