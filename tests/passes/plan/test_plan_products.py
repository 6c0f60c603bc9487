"""Products of attention in integers: which, with what ranges, and what keeps them float."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.plan.plan_products import PlanProducts
from qcompile.planning import Context
from qcompile.rewriting.testing import context, filecheck, normal, parse, plan_text, run_pass

HEADS = "Reshape({0}, heads) {0}t = Transpose<perm = [0, 2, 1, 3]>({0}r)"
MOVED = "qr = Reshape(q, heads) qt = Transpose<perm = [0, 2, 1, 3]>(qr)"


def attention(extra: str = "", outputs: str = "float[B,S,8] y") -> Graph:
    """Query and key of two heads; the value is not moved per head by these operators alone."""
    return parse(
        f"""g (float[B,S,8] x) => ({outputs}) {{
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            qr = Reshape(q, heads)
            kr = Reshape(k, heads)
            vr = Reshape(v, heads)
            qt = Transpose<perm = [0, 2, 1, 3]>(qr)
            kt = Transpose<perm = [0, 2, 3, 1]>(kr)
            vt = Transpose<perm = [0, 2, 1, 3]>(vr)
            s = MatMul(qt, kt)
            p = Softmax(s)
            c = MatMul(p, vt)
            ct = Transpose<perm = [0, 2, 1, 3]>(c)
            y = Reshape(ct, joined)
            {extra}
        }}""",
        wq=normal(8, 8),
        wk=normal(8, 8, seed=1),
        wv=normal(8, 8, seed=2),
        heads=np.array([0, 0, 2, 4]),
        joined=np.array([0, 0, 8]),
    )


def plan(graph: Graph, target: str = "cpu", attention: str = "scores", **choices: Any) -> Context:
    """Plan, which edits nothing, so answers are bit-equal."""
    before = dump(graph)
    ctx = run_pass(
        graph, PlanOperands(), PlanProducts(), ctx=context(target, attention=attention, **choices)
    )
    assert dump(graph) == before
    return ctx


SCORES = """
CHECK: activation q: uint8:asym:tensor at Reshape:qr.0 because attention in uint8 x int8
CHECK-NEXT: activation k: int8:asym:tensor:7-bit at Reshape:kr.0 because attention in uint8 x int8
"""


def test_scores_by_default_with_ranges_where_values_are_made() -> None:
    ctx = plan(attention())
    text = plan_text(ctx)
    filecheck(text, SCORES)
    filecheck(text, "CHECK: activation p: float at MatMul:c.0 because multiplies two activations")
    assert {"q", "k"} <= {r.tensor for r in ctx.requests}
    assert "p" not in ctx.ranges.found


def test_all_products_with_a_known_range_of_probabilities() -> None:
    ctx = plan(attention(), attention="all")
    filecheck(
        plan_text(ctx),
        SCORES
        + """
        CHECK: activation p: uint8:asym:tensor at MatMul:c.0
        CHECK-NEXT: activation v: int8:asym:tensor:7-bit at Reshape:vr.0
        """,
    )
    assert "p" not in {r.tensor for r in ctx.requests}
    assert (float(ctx.ranges.found["p"].lo), float(ctx.ranges.found["p"].hi)) == (0, 1)


def test_a_moved_operand_with_other_readers_is_quantized_after_the_moves() -> None:
    ctx = plan(attention("z = Neg(qt)", "float[B,S,8] y, float[B,2,S,4] z"))
    filecheck(plan_text(ctx), "CHECK: activation qt: uint8:asym:tensor at MatMul:s.0")


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"keep_float": ("k",)}, "kept float by pattern 'k'"),
        ({"precision": (("role:query", "float"),)}, "kept float by precision pattern 'role:query'"),
        ({"precision": (("role:key", 16),)}, "16-bit integers have no kernel on target 'cpu'"),
    ],
)
def test_one_float_operand_keeps_the_other_float(choices: dict[str, Any], reason: str) -> None:
    ctx = plan(attention(), **choices)
    text = plan_text(ctx)
    filecheck(text, f"CHECK: activation q: float at Reshape:qr.0 because {reason}")
    filecheck(text, f"CHECK: activation k: float at Reshape:kr.0 because {reason}")
    assert not {"q", "k"} & {r.tensor for r in ctx.requests}


@pytest.mark.parametrize(
    "choices", [{"attention": "float"}, {"mode": "dynamic"}, {"mode": "weight-only"}]
)
def test_products_stay_float_where_nothing_asks(choices: dict[str, Any]) -> None:
    text = plan_text(plan(attention(), **choices))
    assert "attention in uint8" not in text


def test_a_target_without_such_a_kernel_says_so() -> None:
    ctx = plan(attention(), "qdq", attention="scores")
    assert [s.reason for s in ctx.skips if s.pass_name == "plan-products"] == [
        "target 'qdq' cannot multiply two activations in int8"
    ]


def test_a_product_outside_of_attention_is_left_alone() -> None:
    graph = parse(
        """g (float[B,S,8] x) => (float[B,S,S] y) {
            a = MatMul(x, w)
            t = Transpose<perm = [0, 2, 1]>(x)
            y = MatMul(a, t)
        }""",
        w=normal(8, 8),
    )
    filecheck(plan_text(plan(graph)), "CHECK: activation a: float at MatMul:y.0")
