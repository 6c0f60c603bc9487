"""Stored weights are integers in the file, and ordinary float weights in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.dequantize_at_load import DequantizeAtLoad
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_stored import PlanStored
from qcompile.quant import Array, sqnr_db
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
from qcompile.runtime.session import optimized_ops

GRU = (
    "GRU",
    'y = GRU<hidden_size = 40, direction = "bidirectional", linear_before_reset = 1>(x, w, r)',
)
RNN = ("RNN", "y = RNN<hidden_size = 240>(x, w1, r1)")
STACK = ("MatMul", "y = MatMul(x, e)")
SUM = ("Einsum", 'y = Einsum<equation = "tnd,tdk->tnk">(x, e)')
WEIGHTS = {
    "w": normal(2, 120, 48, seed=1) / 8,
    "r": normal(2, 120, 40, seed=2) / 8,
    "w1": normal(1, 240, 48, seed=1) / 8,
    "r1": normal(1, 240, 240, seed=2) / 16,
    "e": normal(7, 48, 24, seed=3),
}
FEED = {"x": normal(7, 3, 48)}


def stored(body: str) -> Graph:
    graph = parse(f"g (float[7,N,48] x) => (float y) {{ {body} }}", **WEIGHTS)
    run_pass(graph, PlanStored(), InsertQdq(), ctx=context(mode="dynamic"))
    return graph


@pytest.mark.parametrize(("op", "body"), [GRU, RNN, STACK, SUM])
def test_the_runtime_runs_the_float_operator_alone(op: str, body: str) -> None:
    """Bit-equal to a DequantizeLinear, which ONNX Runtime would run in every call."""
    graph = stored(body)
    assert "DequantizeLinear" in optimized_ops(serialize(graph))
    differential(graph, DequantizeAtLoad(), atol=0, feeds=[FEED])
    assert optimized_ops(serialize(graph)) == {op: 1}
    reference = parse(f"g (float[7,N,48] x) => (float y) {{ {body} }}", **WEIGHTS)
    # Weights in 127 steps of their row's largest: 35 dB and more.
    assert sqnr_db(outputs(reference, FEED)["y"], outputs(graph, FEED)["y"]) > 35


def test_integers_with_one_scale_a_row() -> None:
    graph = stored(STACK[1])
    ctx = context()
    ctx.origins["e/scale"] = ("e", None)
    run_pass(graph, DequantizeAtLoad(), ctx=ctx)
    check(
        graph,
        """CHECK: graph g
        CHECK: [[C:%[^ ]+]] = Cast(@e/int8:i8[336,24]{{.*}}) {to=1}
        CHECK: [[M:%[^ ]+]] = Mul([[C]], @e/scale/column:f32[336,1]{{.*}})
        CHECK: [[W:%[^ ]+]] = Reshape([[M]], {{.*}}[7, 48, 24])
        CHECK: %y = MatMul(%x, [[W]])
        CHECK-NOT: DequantizeLinear""",
    )
    assert ctx.origins["e/scale/column"] == ("e", None)


@pytest.mark.parametrize(
    "changed",
    [
        {"z": np.ones(4, np.int8)},
        {"q": np.ones((4, 6), np.uint8), "z": np.zeros(4, np.uint8)},
        {"s": np.ones((), np.float32), "z": np.int8(0)},
    ],
)
def test_it_refuses(changed: dict[str, Array]) -> None:
    values: dict[str, Array] = {
        "q": np.ones((4, 6), np.int8),
        "s": np.ones(4, np.float32),
        "z": np.zeros(4, np.int8),
        "shape": np.array([2, 2, 6]),
        **changed,
    }
    graph = parse(
        """g (float[2,N,2] x) => (float y) {
            d = DequantizeLinear<axis = 0>(q, s, z) r = Reshape(d, shape) y = MatMul(x, r) }""",
        **values,
    )
    assert_refused(graph, DequantizeAtLoad(), "not symmetric int8 per row")


def test_other_dequantizers_are_left_alone() -> None:
    graph = parse(
        """g (float[N,4] x) => (float y) {
            d = DequantizeLinear<axis = 0>(q, s) y = MatMul(x, d) }""",
        q=np.ones((4, 6), np.int8),
        s=np.ones(4, np.float32),
    )
    ctx = run_pass(graph, DequantizeAtLoad())
    assert not ctx.skips and [n.op for n in graph.nodes] == ["DequantizeLinear", "MatMul"]
