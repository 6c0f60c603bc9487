"""Ranges end where all that reads a tensor answers alike."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.ir.printer import dump
from qcompile.passes.transform.trim_ranges import TrimRanges
from qcompile.planning import Context, Decision, Use
from qcompile.quant import QSpec, Range, dequantize, qparams, quantize
from qcompile.rewriting.testing import context, parse, run_pass
from qcompile.runtime.session import Session

U8 = QSpec("uint8", symmetric=False)
S8 = QSpec("int8", symmetric=True)


def graph_of(body: str, outputs: str = "float[N,4] y") -> Graph:
    return parse(
        f"g (float[N,4] t) => ({outputs}) {{ x = Neg(t) {body} }}",
        zero=np.array(0, np.float32),
        six=np.array(6, np.float32),
    )


def planned(graph: Graph, low: float, high: float, spec: QSpec = U8) -> Context:
    ctx = context()
    uses = tuple(
        Use(node.name, i)
        for node in graph.nodes
        for i, tensor in enumerate(node.inputs)
        if tensor.name == "x"
    )
    ctx.plan.decide(Decision("x", "activation", spec, "", uses))
    ctx.ranges.set("x", Range(np.array(low), np.array(high)))
    return ctx


def trimmed(graph: Graph, low: float, high: float, spec: QSpec = U8) -> tuple[float, float]:
    before = dump(graph)
    ctx = run_pass(graph, TrimRanges(), ctx=planned(graph, low, high, spec))
    assert dump(graph) == before
    span = ctx.ranges.get("x")
    assert span is not None
    return float(span.lo), float(span.hi)


@pytest.mark.parametrize(
    ("body", "span", "ends"),
    [
        ("y = HardSwish(x)", (-100, 80), (-3, 80)),
        ("y = HardSigmoid(x)", (-100, 80), (-2.5, 2.5)),
        ("y = HardSigmoid<alpha = 0.5, beta = 0.25>(x)", (-100, 80), (-0.5, 1.5)),
        ("y = Relu(x)", (-7, 5), (0, 5)),
        ("y = Clip(x, zero, six)", (-7, 9), (0, 6)),
        ("a = HardSwish(x) b = Relu(x) y = Add(a, b)", (-7, 9), (-3, 9)),
    ],
)
def test_one_step_is_kept_beyond_each_end(
    body: str, span: tuple[float, float], ends: tuple[float, float]
) -> None:
    found = trimmed(graph_of(body), *span)
    step = (ends[1] - ends[0]) / 253
    for end, old, new, side in zip(ends, span, found, (-1, 1), strict=True):
        expected = old if end == old else end + side * step
        assert new == pytest.approx(expected, abs=step / 100)


@pytest.mark.parametrize(
    ("body", "span"),
    [
        ("y = HardSwish(x)", (-2, 5)),
        ("y = HardSwish(x)", (-3.001, 5)),
        ("y = Relu(x)", (0, 5)),
        ("a = HardSwish(x) y = Add(a, x)", (-9, 5)),
        ("a = HardSwish(x) y = Sigmoid(a) z = Sigmoid(x)", (-9, 5)),
        ("y = HardSigmoid<alpha = 0.0>(x)", (-9, 5)),
    ],
)
def test_what_makes_a_difference_to_anything_stays(body: str, span: tuple[float, float]) -> None:
    outputs = "float[N,4] y, float[N,4] z" if "z = " in body else "float[N,4] y"
    assert trimmed(graph_of(body, outputs), *span) == span


def test_a_graph_output_stays() -> None:
    graph = graph_of("y = HardSwish(x)", "float[N,4] y, float[N,4] x")
    assert trimmed(graph, -9, 5) == (-9, 5)


def test_a_tensor_that_is_all_beyond_keeps_a_range() -> None:
    low, high = trimmed(graph_of("y = HardSwish(x)"), -9, -5)
    assert low <= high <= 0


@pytest.mark.parametrize("spec", [U8, S8])
@pytest.mark.parametrize("high", [0.1, 3.3, 80.0, 81.3, 1000.0])
def test_saturated_values_answer_as_before(high: float, spec: QSpec) -> None:
    """All below -3 still gives 0, exactly, and the steps are finer."""
    graph = graph_of("y = HardSwish(x)")
    wide, span = Range(np.array(-300.0), np.array(high)), trimmed(graph, -300, high, spec)
    params = qparams(Range(np.array(span[0]), np.array(span[1])), spec)
    assert params.scale < qparams(wide, spec).scale or high == 1000 or spec is S8
    values = np.linspace(-300, -3, 64, dtype=np.float32).reshape(-1, 4)
    rounded = dequantize(quantize(values, params), params)
    made = Session(serialize(graph)).run({"t": -rounded})["y"]
    # What is rounded to -3 + half a step at most comes from there: its HardSwish is half of that.
    inside = rounded > -3
    assert not made[~inside].any()
    assert np.abs(values[inside] + 3).max(initial=0) <= params.scale / 2
