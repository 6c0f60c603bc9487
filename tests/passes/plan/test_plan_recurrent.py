"""LSTMs run in int8 with both weights or not at all; every weight has a decision with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.plan.plan_recurrent import PlanRecurrent
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    context,
    filecheck,
    normal,
    parse,
    plan_text,
    run_pass,
)
from qcompile.targets import instruction_sets
from qcompile.targets.cpu import CPU

W, R, B = normal(2, 128, 24), normal(2, 128, 32, seed=1), normal(2, 256, seed=2)


def lstm(
    attrs: str = "", operands: str = "x, w, r, b", inputs: str = "", **changed: Array
) -> Graph:
    weights = {"w": W, "r": R, "b": B, **changed}
    return parse(
        f"""g (float[T,N,24] x{inputs}) => (float y) {{
            y = LSTM<hidden_size = 32, direction = "bidirectional"{attrs}>({operands}) }}""",
        **weights,
    )


UNBOUNDED = ', activations = ["Sigmoid", "Relu", "Relu", "Sigmoid", "Tanh", "Tanh"]'
COMPUTED = ", float[2,128,32] r2"


def planned(graph: Graph, ctx: Context | None = None) -> Context:
    before = dump(graph)
    ctx = run_pass(graph, PlanRecurrent(), ctx=ctx)
    assert dump(graph) == before
    return ctx


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_both_weights_by_gate_and_unit(mode: str) -> None:
    """No range is asked for: the operator quantizes its data itself."""
    ctx = planned(lstm(), context(mode=mode))
    filecheck(
        plan_text(ctx),
        """
        CHECK: weight b: float at LSTM:y.3 because biases, initial states and peepholes
        CHECK-NEXT: weight w: int8:sym:channel[0]:pairs at LSTM:y.1 because DynamicQuantizeLSTM
        CHECK-NEXT: weight r: int8:sym:channel[0]:pairs at LSTM:y.2 because DynamicQuantizeLSTM
        CHECK-NEXT: activation x: float at LSTM:y.0 because DynamicQuantizeLSTM quantizes it itself
        """,
    )
    assert [d.stacked for d in ctx.plan.quantized("weight")] == [2, 2]
    assert not ctx.requests and not ctx.skips


def test_exact_sums_leave_all_eight_bits() -> None:
    ctx = context()
    ctx.target = instruction_sets.fitted(CPU, "avx512-vnni")
    assert "weight w: int8:sym:channel[0] at" in plan_text(planned(lstm(), ctx))


@pytest.mark.parametrize(("target", "mode"), [("cpu", "weight-only"), ("qdq", "static")])
def test_without_a_rule_only_vectors_are_decided_on(target: str, mode: str) -> None:
    ctx = planned(lstm(), context(target, mode=mode))
    assert [d.tensor for d in ctx.plan.decisions] == ["b"]


def bad(value: float) -> Array:
    weights = W.copy()
    weights[1, 5, 7] = value
    return weights


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (lstm(inputs=COMPUTED, operands="x, w, r2"), "one of its weights is computed"),
        (lstm(UNBOUNDED), "without bounds"),
        (lstm(w=bad(np.nan)), "holds NaN or infinity"),
        (lstm(w=bad(1e30)), "too large for a scale"),
        (
            parse(
                "g (float[T,N,2] x) => (float y) { y = LSTM<hidden_size = 4>(x, w, r) }",
                w=normal(1, 16, 2),
                r=normal(1, 16, 4),
            ),
            "weights under 16 KiB",
        ),
    ],
)  # fmt: skip
def test_it_refuses(graph: Graph, reason: str) -> None:
    ctx = assert_refused(graph, PlanRecurrent(), reason)
    assert not list(ctx.plan.quantized())
    assert reason in next(d.reason for d in ctx.plan.decisions if d.tensor == "w")


@pytest.mark.parametrize("pattern", ["w", "LSTM:y", "y", "x"])
def test_what_the_user_wants_float_stays(pattern: str) -> None:
    ctx = planned(lstm(), context(keep_float=(pattern,)))
    assert not list(ctx.plan.quantized())
    ctx = planned(lstm(), context(precision=[(pattern, "float")]))
    assert not list(ctx.plan.quantized())
    assert "kept float by precision pattern" in plan_text(ctx)


def test_bounded_activations_are_known_in_any_case() -> None:
    graph = lstm(', activations = ["sigmoid", "TANH", "Softsign", "HardSigmoid", "Tanh", "Tanh"]')
    assert len(list(planned(graph).plan.quantized())) == 2
