"""Rows are looked up as int8 and scaled afterwards; the table is never dequantized as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.lower_embeddings import LowerEmbeddings
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)
from qcompile.runtime.session import optimized_ops

TABLE = np.random.default_rng(0).integers(-127, 128, (9, 4), np.int8)
SCALES = np.random.default_rng(1).uniform(0.001, 0.01, 9).astype(np.float32)
LOOKUP = "t = DequantizeLinear<axis = 0>(tq, s) y = Gather(t, i)"
# Negative indices count from the end, in both lookups.
YES = np.array(True)
FEEDS = [{"i": np.array([[8]]), "c": YES}, {"i": np.array([[0, 3, -1], [2, 2, -9]]), "c": YES}]


def embedding(
    body: str, indices: str = "int64[B,S] i", out: str = "float[B,S,4] y", **changed: Array
) -> Graph:
    weights: dict[str, Array] = {"tq": TABLE, "s": SCALES, "g": normal(4), **changed}
    return parse(f"g ({indices}, bool c) => ({out}) {{ {body} }}", **weights)


@pytest.mark.parametrize("axis", [0, -2])
def test_rows_are_scaled_after_the_lookup(axis: int) -> None:
    """Bit-equal: the same int8 times the same float32, before or after choosing rows."""
    body = LOOKUP.replace("axis = 0", f"axis = {axis}").replace("Gather", f"Gather<axis = {axis}>")
    graph = embedding(body)
    ctx = context()
    ctx.origins["s"] = ("t", None)
    differential(graph, LowerEmbeddings(), atol=0, feeds=FEEDS, ctx=ctx)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: [[ROWS:%[^ ]+]] = Gather(@tq:i8[9,4]{{[^,]+}}, %i) {axis=0}
        CHECK-NEXT: [[REAL:%[^ ]+]] = Cast([[ROWS]]) {to=1}
        CHECK-NEXT: [[SCALES:%[^ ]+]] = Gather(@s/column:f32[9,1]{{[^,]+}}, %i) {axis=0}
        CHECK-NEXT: %y = Mul([[REAL]], [[SCALES]])
        CHECK-NOT: %
        """,
    )
    np.testing.assert_array_equal(array(graph.constants()["s/column"]).reshape(-1), SCALES)
    assert ctx.origins["s/column"] == ("t", None)


def test_a_zero_point_of_zeros_is_none() -> None:
    graph = embedding(LOOKUP.replace("(tq, s)", "(tq, s, z)"), z=np.zeros(9, np.int8))
    differential(graph, LowerEmbeddings(), atol=0, feeds=FEEDS)


def test_a_table_may_be_a_weight_transposed() -> None:
    """The output layer has the table as its weight; ONNX Runtime transposes it once."""
    body = """w = DequantizeLinear<axis = 1>(wq, s)
        t = Transpose<perm = [1, 0]>(w)
        y = Gather(t, i)"""
    graph = embedding(body, wq=np.ascontiguousarray(TABLE.T))
    differential(graph, LowerEmbeddings(), atol=0, feeds=FEEDS)
    check(
        graph,
        """
        CHECK: [[T:%[^ ]+]] = Transpose(@wq:i8[4,9]{{[^)]*}}) {perm=[1, 0]}
        CHECK-NEXT: Gather([[T]], %i) {axis=0}
        CHECK-NOT: DequantizeLinear
        """,
    )
    assert optimized_ops(serialize(graph)) == {"Gather": 2, "Cast": 1, "Mul": 1}


def test_refuses_a_transposed_table_with_scales_along_its_rows() -> None:
    body = """w = DequantizeLinear<axis = 0>(tq, s)
        t = Transpose<perm = [1, 0]>(w)
        y = Gather(t, i)"""
    reason = "the table does not have one scale per row"
    assert_refused(embedding(body, out="float[B,S,9] y"), LowerEmbeddings(), reason)


def test_a_single_index() -> None:
    graph = embedding(LOOKUP, "int64 i", "float[4] y")
    differential(graph, LowerEmbeddings(), atol=0, feeds=[{"i": np.array(3), "c": YES}])


def test_two_lookups_in_one_table() -> None:
    graph = embedding(LOOKUP + " z = Gather(t, i)", out="float[B,S,4] y, float[B,S,4] z")
    differential(graph, LowerEmbeddings(), atol=0, feeds=FEEDS)
    check(graph, "CHECK-COUNT-2: Gather(@tq:i8[9,4]\nCHECK-NOT: DequantizeLinear")


def test_a_table_that_others_read_stays_dequantized_for_them() -> None:
    graph = embedding(
        "t = DequantizeLinear<axis = 0>(tq, s) y = Gather(t, i) z = Transpose(t)",
        out="float[B,S,4] y, float[4,9] z",
    )
    differential(graph, LowerEmbeddings(), atol=0, feeds=FEEDS)
    check(
        graph,
        """
        CHECK-DAG: Gather(@tq:i8[9,4]
        CHECK-DAG: %t = DequantizeLinear(@tq:i8[9,4]
        CHECK-DAG: %z = Transpose(%t)
        """,
    )


def test_an_inner_row_may_be_a_graph_output_or_read_in_a_subgraph() -> None:
    branches = """z = If (c) <
        then_branch = yes () => (float[B,S,4] p) { p = Neg(e) },
        else_branch = no () => (float[B,S,4] q) { q = Abs(e) }
    >"""
    graph = embedding(
        f"t = DequantizeLinear<axis = 0>(tq, s) e = Gather(t, i) y = Mul(e, g) {branches}",
        out="float[B,S,4] y, float[B,S,4] e, float[B,S,4] z",
    )
    feeds = [{**feed, "c": np.array(c)} for feed in FEEDS for c in (True, False)]
    differential(graph, LowerEmbeddings(), atol=0, feeds=feeds)
    check(graph, "CHECK: %e = Mul(")


def test_the_runtime_dequantizes_nothing() -> None:
    graph = embedding(LOOKUP)
    run_pass(graph, LowerEmbeddings())
    assert optimized_ops(serialize(graph)) == {"Gather": 2, "Cast": 1, "Mul": 1}


@pytest.mark.parametrize(
    ("old", "new", "weights", "reason"),
    [
        ("", "", {"tq": TABLE.astype(np.uint8)}, "the table is not symmetric int8"),
        ("(tq, s)", "(tq, s, z)", {"z": np.ones(9, np.int8)}, "the table is not symmetric int8"),
        ("axis = 0>(tq", "axis = 1>(tq", {"s": SCALES[:4]}, "one scale per row"),
        ("axis = 0>(tq", "axis = 1>(tq", {"tq": TABLE[:4], "s": SCALES[:4]}, "one scale per row"),
        ("<axis = 0>", "", {"s": np.array(0.1, np.float32)}, "one scale per row"),
        ("", "", {"s": np.array([0.1], np.float32)}, "one scale per row"),
        ("Gather(t", "Gather<axis = 1>(t", {}, "not along the rows of the table"),
        ("", "", {"tq": np.ones((9, 4, 1), np.int8)}, "the table is not a constant matrix"),
    ],
)
def test_refuses_other_tables(old: str, new: str, weights: Any, reason: str) -> None:
    assert_refused(embedding(LOOKUP.replace(old, new), **weights), LowerEmbeddings(), reason)


def test_refuses_computed_scales() -> None:
    graph = embedding("k = Neg(s) t = DequantizeLinear<axis = 0>(tq, k) y = Gather(t, i)")
    assert_refused(graph, LowerEmbeddings(), "one scale per row")


def test_refuses_a_computed_table() -> None:
    graph = embedding("k = Identity(tq) t = DequantizeLinear<axis = 0>(k, s) y = Gather(t, i)")
    assert_refused(graph, LowerEmbeddings(), "the table is not a constant matrix")


def test_float_tables_are_no_refusal() -> None:
    graph = embedding("f = Cast<to = 1>(tq) y = Gather(f, i)")
    ctx = run_pass(graph, LowerEmbeddings())
    assert not ctx.skips
