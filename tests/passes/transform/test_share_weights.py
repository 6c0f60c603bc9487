"""A weight that is quantized for some of its readers is stored as integers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.share_weights import ShareWeights
from qcompile.planning import Context, Use
from qcompile.rewriting.testing import check, context, differential, normal, parse, run_pass
from tests.passes.corpus import tied

TABLE = normal(64, 8)


def planned(graph: Graph, **choices: Any) -> Context:
    return run_pass(graph, PlanOperands(), ctx=context(**{"mode": "dynamic", **choices}))


def tied_by_gemm(extra: str = "", out: str = "") -> Graph:
    """The output layer reads the table itself."""
    body = "e = Gather(t, ids) f = Reshape(e, rows) y = Gemm<transB = 1>(f, t)" + extra
    text = f"g (int64[B,S] ids, bool c) => (float[N,64] y{out}) {{ {body} }}"
    return parse(text, t=TABLE, rows=np.array([-1, 8]))


def weight_uses(ctx: Context) -> list[tuple[str, tuple[Use, ...]]]:
    return [(d.tensor, d.uses) for d in ctx.plan.quantized("weight")]


def test_a_table_that_is_the_weight_transposed_is_read_through_a_transpose() -> None:
    graph = tied()
    ctx = planned(graph)
    differential(graph, ShareWeights(), atol=0, ctx=ctx)  # the same values
    check(
        graph,
        """
        CHECK: [[T:%[^ ]+]] = Transpose(@out:f32[8,64]{{[^)]*}}) {perm=[1, 0]}
        CHECK-NEXT: %e = Gather([[T]], %few)
        CHECK: %y = MatMul(%h, @out
        """,
    )
    run_pass(graph, InsertQdq(), ctx=ctx)
    assert [
        n for n, t in graph.constants().items() if t.dtype == np.float32 and len(t.shape) > 1
    ] == []


def test_a_float_reader_reads_what_is_dequantized() -> None:
    graph = tied_by_gemm()
    ctx = planned(graph)
    before = graph.constants().keys()
    run_pass(graph, ShareWeights(), InsertQdq(), ctx=ctx)
    assert [d.uses for d in ctx.plan.decisions if d.tensor == "t"] == [
        (Use("Gemm:y", 1), Use("Gather:e", 0))
    ]
    assert "t" in before
    assert "t" not in graph.constants()
    check(graph, "CHECK: %e = Gather(%t/dequantized, %ids)")


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"keep_float": ("e",)}, "kept float by pattern 'e'"),
        ({"precision": [("e", "float")]}, "kept float by precision pattern 'e'"),
        ({"target": "tensorrt", "mode": "static"}, "target 'tensorrt' has no rule for Gather"),
    ],
)
def test_refuses_readers_that_must_read_floats(choices: dict[str, Any], reason: str) -> None:
    graph = tied_by_gemm()
    ctx = planned(graph, **choices)
    before = weight_uses(ctx)
    run_pass(graph, ShareWeights(), ctx=ctx)
    assert weight_uses(ctx) == before
    assert any(s.node == "t" and reason in s.reason for s in ctx.skips)


def test_refuses_a_weight_that_a_subgraph_reads() -> None:
    branches = """ z = If (c) <
        then_branch = yes () => (float[64,8] p) { p = Neg(t) },
        else_branch = no () => (float[64,8] q) { q = Abs(t) }
    >"""
    graph = tied_by_gemm(branches, ", float[64,8] z")
    ctx = planned(graph)
    run_pass(graph, ShareWeights(), ctx=ctx)
    assert ("t", "a subgraph reads it as it is: it is stored as floats too") in [
        (s.node, s.reason) for s in ctx.skips
    ]


def test_small_weights_and_other_tables_are_left_alone() -> None:
    """Under 1 KiB; and a table that is no weight."""
    graph = parse(
        """g (int64[B,S] ids) => (float[B,S,8] y) {
            e = Gather(t, ids)
            y = MatMul(e, w)
        }""",
        t=TABLE,
        w=normal(8, 8),
    )
    ctx = planned(graph)
    assert not ShareWeights().run(graph, ctx)
    assert not ctx.skips or all(s.pass_name != "share-weights" for s in ctx.skips)
