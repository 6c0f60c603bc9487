"""Weights that no integer kernel reads are 8 bits in the file; others and the user's stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.plan.plan_recurrent import PlanRecurrent
from qcompile.passes.plan.plan_stored import PlanStored
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting.testing import context, filecheck, normal, parse, plan_text, run_pass

PLAN = (PlanOperands(), PlanRecurrent(), PlanStored())
MODES = ("static", "dynamic", "weight-only")
STORED = "8 bits in the file, float once loaded: no integer kernel"


def planned(graph: Graph, target: str = "cpu", **choices: Any) -> Context:
    before = dump(graph)
    ctx = run_pass(graph, *PLAN, ctx=context(target, **choices))
    assert dump(graph) == before
    return ctx


def layer(op: str, gates: int, inputs: int = 24, **changed: Array) -> Graph:
    weights = {"w": normal(1, gates * 32, inputs), "r": normal(1, gates * 32, 32, seed=1)}
    return parse(
        f"g (float[T,N,{inputs}] x) => (float y) {{ y = {op}<hidden_size = 32>(x, w, r) }}",
        **{**weights, **changed},
    )


@pytest.mark.parametrize("mode", MODES)
def test_recurrent_layers_without_an_integer_kernel(mode: str) -> None:
    for op, gates in (("GRU", 6), ("RNN", 6)):
        hidden = gates * 32 // {"GRU": 3, "RNN": 1}[op]
        graph = parse(
            f"g (float[T,N,40] x) => (float y) {{ y = {op}<hidden_size = {hidden}>(x, w, r) }}",
            w=normal(1, 192, 40),
            r=normal(1, 192, hidden, seed=1),
        )
        text = plan_text(planned(graph, mode=mode))
        for i, name in enumerate("wr", 1):
            line = f"weight {name}: int8:sym:channel[0] at {op}:y.{i} because {STORED}"
            assert line in text


def test_an_lstm_that_cannot_run_in_integers_is_stored() -> None:
    unbounded = ', activations = ["Sigmoid", "Relu", "Relu"]'
    graph = parse(
        f"""g (float[T,N,40] x) => (float y) {{
            y = LSTM<hidden_size = 32{unbounded}>(x, w, r) }}""",
        w=normal(1, 128, 40),
        r=normal(1, 128, 32, seed=1),
    )
    ctx = planned(graph)
    filecheck(
        plan_text(ctx),
        f"""CHECK: weight w: int8:sym:channel[0] at LSTM:y.1 because {STORED}
        CHECK-NEXT: weight r: int8:sym:channel[0] at LSTM:y.2 because {STORED}
        CHECK-NOT: weight""",
    )


def test_what_has_an_integer_kernel_is_not_its_business() -> None:
    graph = parse(
        """g (float[T,N,24] x) => (float y, float z) {
            y = LSTM<hidden_size = 32>(x, w, r) z = MatMul(x, m) }""",
        w=normal(1, 128, 24),
        r=normal(1, 128, 32),
        m=normal(24, 256),
    )
    assert STORED not in plan_text(planned(graph))


@pytest.mark.parametrize("mode", MODES)
def test_stacks_of_matrices_and_transposed_convolutions(mode: str) -> None:
    graph = parse(
        """g (float[8,N,32] x, float[N,16,4,4] i) => (float y, float z) {
            y = MatMul(x, e) z = ConvTranspose(i, k) }""",
        e=normal(8, 32, 24),
        k=normal(16, 32, 3, 3),
    )
    ctx = planned(graph, mode=mode)
    stacked = {d.tensor: d.stacked for d in ctx.plan.quantized("weight")}
    assert stacked == {"e": 2, "k": 1}
    assert STORED in plan_text(ctx)


@pytest.mark.parametrize("mode", MODES)
def test_convolutions_are_stored_where_no_mode_of_theirs_is(mode: str) -> None:
    graph = parse("g (float[N,16,8,8] x) => (float y) { y = Conv(x, k) }", k=normal(32, 16, 3, 3))
    assert (STORED in plan_text(planned(graph, mode=mode))) == (mode == "weight-only")


def bad(value: float) -> Array:
    weights = normal(1, 192, 24)
    weights[0, 5, 7] = value
    return weights


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (bad(np.inf), "holds NaN or infinity"),
        (bad(1e30), "too large for a scale"),
        (normal(1, 192, 2), "under 16 KiB"),
    ],
)
def test_it_refuses(weight: Array, reason: str) -> None:
    graph = parse(
        f"g (float[T,N,{weight.shape[2]}] x) => (float y) {{ y = GRU<hidden_size = 64>(x, w, r) }}",
        w=weight,
        r=normal(1, 192, 64),
    )
    ctx = planned(graph)
    assert [d.tensor for d in ctx.plan.quantized()] == ["r"]
    assert reason in next(d.reason for d in ctx.plan.decisions if d.tensor == "w")
    assert any(reason in s.reason for s in ctx.skips)


def test_a_scale_for_few_values_is_not_worth_it() -> None:
    graph = parse(
        "g (float[T,N,4] x) => (float y) { y = GRU<hidden_size = 352>(x, w, r) }",
        w=normal(1, 1056, 4),
        r=normal(1, 1056, 352),
    )
    assert "weight w: float at GRU:y.1 because under 8 values per scale" in plan_text(
        planned(graph)
    )


@pytest.mark.parametrize("pattern", ["w", "GRU:y", "y"])
def test_what_the_user_wants_float_stays(pattern: str) -> None:
    graph = layer("GRU", 3, 64)
    ctx = planned(graph, keep_float=(pattern,))
    assert "w" not in [d.tensor for d in ctx.plan.quantized()]
    ctx = planned(graph, precision=[(pattern, "float")])
    assert "w" not in [d.tensor for d in ctx.plan.quantized()]


def test_other_targets_store_what_their_tables_say() -> None:
    graph = layer("GRU", 3)
    assert "DequantizeLinear on the weight" in plan_text(planned(graph, target="qdq"))
    assert "TensorRT computes recurrent layers in float" in plan_text(
        planned(graph, target="tensorrt")
    )
