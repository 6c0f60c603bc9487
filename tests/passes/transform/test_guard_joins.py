"""Joined tensors keep float values where one scale would ruin a branch."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.transform.guard_joins import GuardJoins
from qcompile.planning import Context, Decision, uses_of
from qcompile.planning.plan import Use
from qcompile.quant import QSpec, Range, sqnr_db
from qcompile.rewriting.testing import context, filecheck, normal, parse, plan_text, run_pass
from qcompile.rewriting.testing import outputs as run

U8 = QSpec("uint8", symmetric=False)
U16 = QSpec("uint16", symmetric=False)
KERNEL = QSpec("int8", symmetric=True, granularity="channel", axis=0, narrow=True)


def head(reader: str = "y = Sigmoid(c)") -> Graph:
    return parse(
        f"""g (float[N,2,4,4] boxes, float[N,3,4,4] scores) => (float[N,5,4,4] y) {{
            c = Concat<axis = 1>(boxes, scores) {reader}
        }}""",
        w=normal(5, 5, 1, 1),
    )


def planned(
    graph: Graph,
    boxes: tuple[float, float],
    scores: tuple[float, float],
    spec: QSpec = U8,
    target: str = "cpu",
) -> Context:
    """The joined tensor, both branches and the weight of a convolution are to be quantized."""
    ctx = context(target)
    both = (min(boxes[0], scores[0]), max(boxes[1], scores[1]))
    for name, (low, high) in {"boxes": boxes, "scores": scores, "c": both}.items():
        uses = uses_of(graph.tensors()[name])
        ctx.plan.decide(Decision(name, "activation", spec, "planned", uses))
        ctx.ranges.set(name, Range(np.array(low), np.array(high)))
    for node in graph.nodes:
        if node.op == "Conv":
            uses = (Use(node.name, 1),)
            ctx.plan.decide(Decision("w", "weight", KERNEL, "planned", uses))
    return ctx


def left_float(ctx: Context) -> set[str]:
    return {d.tensor for d in ctx.plan.decisions if d.spec is None}


@pytest.mark.parametrize(
    ("boxes", "scores", "refused"),
    [
        ((0, 640), (0, 1), True),
        ((0, 17), (0, 1), True),  # 15 steps: 23.5 dB
        ((0, 15), (0, 1), False),  # 17 steps: 24.6 dB
        ((-1, 1), (0, 1), False),
        ((0, 640), (0, 0), False),  # zero is exact with any scale
        ((0, 640), (325, 335), False),  # its own scale would be hardly finer
        ((0, 640), (1, 1), True),  # a constant counts by its magnitude
    ],
)  # fmt: skip
def test_ranges_far_apart_are_refused(
    boxes: tuple[float, float], scores: tuple[float, float], refused: bool
) -> None:
    graph = head()
    ctx = run_pass(graph, GuardJoins(), ctx=planned(graph, boxes, scores))
    assert left_float(ctx) == ({"c"} if refused else set())
    assert [s.node for s in ctx.skips] == (["c"] if refused else [])


def test_the_reason_says_which_branch_loses_what() -> None:
    graph = head()
    ctx = run_pass(graph, GuardJoins(), ctx=planned(graph, (0, 640), (0, 1)))
    reason = (
        "CHECK: activation c: float at Sigmoid:y.0 because it joins branches with very different "
        "ranges: 'scores' "
        "has 0 to 1, all together 0 to 640; one scale would leave it -8.0 dB SQNR, 24 are required"
    )
    filecheck(plan_text(ctx), reason)


def test_sixteen_bits_hold_both() -> None:
    graph = head()
    assert not left_float(run_pass(graph, GuardJoins(), ctx=planned(graph, (0, 640), (0, 1), U16)))


def test_a_share_of_the_noise_can_be_asked_for() -> None:
    graph = head()
    ctx = planned(graph, (0, 640), (0, 1))
    assert not left_float(run_pass(graph, GuardJoins(least_sqnr=-10), ctx=ctx))


@pytest.mark.parametrize(("target", "expected"), [("cpu", {"c", "w"}), ("qdq", {"c"})])
def test_a_product_that_reads_it_stays_float_as_a_whole(target: str, expected: set[str]) -> None:
    """Except where each tensor has its own quantizer: there the weight stays int8."""
    graph = head("y = Conv(c, w)")
    ctx = planned(graph, (0, 640), (0, 1), target=target)
    assert left_float(run_pass(graph, GuardJoins(), ctx=ctx)) == expected


def test_functions_after_the_join_bring_ranges_together() -> None:
    """Sigmoid makes 0.5 to 1 of boxes and of scores."""
    graph = head("s = Sigmoid(c) y = Neg(s)")
    ctx = planned(graph, (0, 640), (0, 6))
    ctx.plan.decide(Decision("s", "activation", U8, "planned", uses_of(graph.tensors()["s"])))
    ctx.ranges.set("s", Range(np.array(0.5), np.array(1.0)))
    assert left_float(run_pass(graph, GuardJoins(), ctx=ctx)) == {"c"}


def test_scales_by_channel_count_by_their_noise() -> None:
    """A class token next to patches: a fine scale for a few channels does not help it."""
    graph = parse(
        """g (float[N,16,8] patches) => (float[N,17,8] y) {
            c = Concat<axis = 1>(token, patches)  y = Neg(c)
        }""",
        token=0.1 * normal(1, 1, 8),
    )
    for fine, refused in ((1, {"c"}), (8, set())):
        ctx = context("qdq")
        ends = np.where(np.arange(8) < fine, 0.2, 4.0)
        uses = uses_of(graph.tensors()["c"])
        ctx.plan.decide(Decision("c", "activation", U8, "planned", uses))
        ctx.ranges.set("c", Range(-ends, ends, -1))
        assert left_float(run_pass(graph, GuardJoins(), ctx=ctx)) == refused


def test_scores_survive() -> None:
    """The prediction holds: evenly spread scores have -8 dB with the joint scale."""
    even = np.random.default_rng(0).uniform(0, 1, (2, 5, 4, 4)).astype(np.float32)
    feed = {"boxes": even[:, :2] * 640, "scores": even[:, 2:]}
    found = []
    for guards in ([], [GuardJoins()]):
        graph = head("y = Neg(c)")
        expected = run(graph, feed)["y"][:, 2:]
        run_pass(graph, *guards, InsertQdq(), ctx=planned(graph, (0, 640), (0, 1)))
        found.append(sqnr_db(expected, run(graph, feed)["y"][:, 2:]))
    assert found[0] < 1 < 40 < found[1]
