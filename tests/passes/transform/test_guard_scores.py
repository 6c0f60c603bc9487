"""Scores stay float where rounding query and key would blur them, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.plan.plan_products import PlanProducts
from qcompile.passes.transform.guard_scores import GuardScores
from qcompile.planning import Context
from qcompile.quant import Array, ChannelStats, Range
from qcompile.rewriting.testing import context, filecheck, normal, plan_text, run_pass
from tests.passes.corpus import attention

WIDTH = 8  # two heads of four


def guarded(
    query: Array, key: Array, limit: float = GuardScores.limit, seen: bool = True
) -> tuple[str, Context]:
    """Plan the attention of the corpus as if these rows had been sampled, and guard its scores."""
    graph, ctx = attention(), context(attention="scores")
    run_pass(graph, PlanOperands(), PlanProducts(), ctx=ctx)
    wanted = list(GuardScores().wants(graph, ctx))
    assert len(wanted) == 2
    for name, rows in zip(wanted, (query, key), strict=True):
        ctx.ranges.set(name, Range(np.array(rows.min()), np.array(rows.max())))
        if seen:
            ctx.channels[name] = ChannelStats(rows.min(0), rows.max(0), rows)
    run_pass(graph, GuardScores(limit), ctx=ctx)
    return plan_text(ctx), ctx


def noise(query: Array, key: Array) -> float:
    """What rounding does to scores of the worst head, measured: in parts of 1 or of the spread.

    The query has 8 bits, the key 7: 255 and 128 steps.
    """

    def rounded(rows: Array, steps: int) -> Array:
        step = (rows.max() - rows.min()) / steps
        result: Array = np.rint(rows / step) * step
        return result

    worst = 0.0
    for head in (slice(0, 4), slice(4, 8)):
        exact = query[:, head] @ key[:, head].T
        moved = rounded(query, 255)[:, head] @ rounded(key, 128)[:, head].T
        spread = exact.std(1).mean()
        worst = max(worst, float((moved - exact).std() / min(1.0, spread)))
    return worst


def rows(seed: int, wide: float = 1.0) -> Array:
    made = normal(200, WIDTH, seed=seed)
    made[:, 0] *= wide
    return made


def test_plain_scores_are_integers() -> None:
    text, _ = guarded(rows(0), rows(1))
    filecheck(text, "CHECK: uint8:asym:tensor at {{.+}} because attention in uint8 x int8")


def test_an_outlier_channel_keeps_them_float_and_says_why() -> None:
    text, ctx = guarded(rows(0, 30), rows(1))
    assert "attention in uint8" not in text
    filecheck(
        text, "CHECK: float at {{.+}} because rounding noise of the scores would be {{0[.][0-9]+}}"
    )
    assert not any(d.spec and d.spec.dtype == "int8" for d in ctx.plan.quantized("activation"))


@pytest.mark.parametrize(("wide", "size"), [(1, 1), (8, 1), (1, 0.05), (3, 0.3)])
def test_the_estimate_is_what_rounding_does(wide: float, size: float) -> None:
    """Uniform rounding noise of 200 x 200 scores: within a fifth of the estimate."""
    query, key = rows(0, wide) * np.float32(size), rows(1) * np.float32(size)
    measured = noise(query, key)
    assert "attention in uint8" in guarded(query, key, measured * 1.2)[0]
    assert "attention in uint8" not in guarded(query, key, measured / 1.2)[0]


def test_what_was_not_sampled_is_left_alone() -> None:
    assert "attention in uint8" in guarded(rows(0, 30), rows(1), seen=False)[0]


def test_a_negative_limit_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="limit is -1"):
        GuardScores(limit=-1)


def test_graph_without_attention() -> None:
    graph: Graph = attention()
    ctx = context(attention="float")
    run_pass(graph, PlanOperands(), PlanProducts(), GuardScores(), ctx=ctx)
    assert list(GuardScores().wants(graph, ctx)) == []
