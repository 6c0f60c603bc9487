"""A table and the weight of the output layer are one tensor, with one number of bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.simplify.raise_opset import RaiseOpset
from qcompile.passes.transform.share_weights import ShareWeights
from qcompile.passes.transform.tie_tables import TieTables
from qcompile.planning import Context, Use
from qcompile.rewriting.testing import check, context, normal, parse, run_pass

ROWS, CHANNELS = 600, 32
TABLE = normal(ROWS, CHANNELS)
TURNED = "e = Gather(t, ids) h = Tanh(e) y = MatMul(h, o)"
GEMM = "e = Gather(t, ids) h = Tanh(e) y = Gemm<transB = 1>(h, t)"


def tied(body: str = TURNED, more: str = "", **weights: Any) -> Graph:
    """Rows are looked up in what the output layer multiplies by."""
    given = {
        "t": TABLE,
        **({"o": np.ascontiguousarray(TABLE.T)} if "o)" in body else {}),
        **weights,
    }
    return parse(f"g (int64[N] ids) => (float[N,{ROWS}] y{more}) {{ {body} }}", **given)


def planned(graph: Graph, target: str = "cpu", **choices: Any) -> Context:
    return run_pass(
        graph, RaiseOpset(), PlanOperands(), ctx=context(target, mode="weight-only", **choices)
    )


def decided(ctx: Context) -> dict[str, tuple[int, int, tuple[Use, ...]]]:
    """Bits, block and uses of each quantized weight."""
    found = ctx.plan.quantized("weight")
    return {d.tensor: (d.spec.bits, d.spec.block or 0, d.uses) for d in found if d.spec}


@pytest.mark.parametrize(
    ("weight", "table", "bits", "block"),
    [(4, 4, 4, 32), (8, 4, 8, 0), (4, 8, 8, 0), (4, 2, 4, 32), (2, 4, 4, 64), (None, 4, 8, 0)],
)
def test_both_have_the_larger_number_of_bits(
    weight: int | None, table: int, bits: int, block: int
) -> None:
    asked: dict[str, Any] = {"embedding_bits": 8} if table == 8 else {"precision": (("t", table),)}
    graph = tied()
    ctx = planned(graph, weight_bits=weight, **asked)
    run_pass(graph, TieTables(), ShareWeights(), ctx=ctx)
    check(graph, "CHECK: [[T:%[^ ]+]] = Transpose(@o\nCHECK-NEXT: %e = Gather([[T]], %ids)")
    uses = (Use("MatMul:y", 1), Use(graph.nodes[0].name, 0))
    assert decided(ctx) == {"o": (bits, block, uses)}
    assert ("tied-table-bits" in ctx.remarks) == ((weight or 8) != table)


def test_the_report_says_which_bits_were_used() -> None:
    graph = tied(GEMM)
    ctx = planned(graph, weight_bits=4, precision=(("Gather:e", 6),))
    run_pass(graph, TieTables(), ctx=ctx)
    assert decided(ctx) == {"t": (6, 0, (Use("Gemm:y", 1), Use("Gather:e", 0)))}
    assert ctx.remarks["tied-table-bits"] == (
        "'t' is looked up in and is the weight of 'Gemm:y': stored once, in 6 bits, the more of 6 "
        "for tables and 4 for layers"
    )
    (decision,) = ctx.plan.quantized("weight")
    assert decision.reason.startswith("as many bits as the table with its values: 6 bits in the")


def test_a_bound_of_8_bits_comes_with_8_bits() -> None:
    """That of the target's rule for the layer, on the layer's axis."""
    graph = tied(GEMM)
    ctx = context("cpu", mode="dynamic", weight_bits=4, embedding_bits=8)
    run_pass(graph, RaiseOpset(), PlanOperands(), TieTables(), ctx=ctx)
    (decision,) = ctx.plan.quantized("weight")
    assert str(decision.spec) == "int8:sym:channel[0]:pairs"


@pytest.mark.parametrize(
    ("graph", "target", "choices"),
    [
        (
            tied(t=normal(ROWS, CHANNELS, seed=1)),
            "cpu",
            {"weight_bits": 4, "precision": (("t", 4),)},
        ),
        (tied(), "cpu", {"embedding_bits": 8}),
        (tied(), "cuda", {"weight_bits": 4, "precision": (("t", 4),)}),
        (tied(), "cpu", {"weight_bits": 4, "precision": (("t", "float"),)}),
    ],
    ids=["other values", "8 bits", "a target that cannot", "float"],
)
def test_others_are_left_alone(graph: Graph, target: str, choices: dict[str, Any]) -> None:
    ctx = planned(graph, target, **choices)
    before = decided(ctx)
    assert not TieTables().run(graph, ctx)
    assert decided(ctx) == before
    assert not any(s.pass_name == "tie-tables" for s in ctx.skips)


def test_refuses_a_table_that_others_read() -> None:
    graph = tied(f"{TURNED} z = Neg(t)", f", float[{ROWS},{CHANNELS}] z")
    ctx = planned(graph, weight_bits=4, precision=(("t", 4),))
    run_pass(graph, TieTables(), ctx=ctx)
    assert [s.reason for s in ctx.skips if s.pass_name == "tie-tables"] == [
        "'Neg:z' reads the table too: it is stored in addition to its layer's weight"
    ]
    assert len(decided(ctx)) == 2
