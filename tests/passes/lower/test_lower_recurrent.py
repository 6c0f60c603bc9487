"""LSTMs with int8 weights become ONNX Runtime's integer LSTM, in all their forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.lower.lower_recurrent import LowerRecurrent
from qcompile.passes.plan.plan_recurrent import PlanRecurrent
from qcompile.quant import Array, sqnr_db
from qcompile.quant.weight_rounding import PAIR_SUM, pairs, worst_sums
from qcompile.rewriting.testing import (
    assert_equivalent,
    assert_refused,
    check,
    context,
    normal,
    outputs,
    parse,
    run_pass,
)
from qcompile.runtime.session import optimized_ops

PLANNED = (PlanRecurrent(), InsertQdq())
INPUTS, HIDDEN = 25, 32


def lstm(directions: int = 1, attrs: str = "", operands: str = "x, w, r", **extra: Any) -> Graph:
    direction = {1: "", 2: ', direction = "bidirectional"'}[directions]
    weights = {
        "w": normal(directions, 4 * HIDDEN, INPUTS, seed=1) / 5,
        "r": normal(directions, 4 * HIDDEN, HIDDEN, seed=2) / 6,
        **extra,
    }
    return parse(
        f"""g (float[T,N,{INPUTS}] x) => (float y, float h, float c) {{
            y, h, c = LSTM<hidden_size = {HIDDEN}{direction}{attrs}>({operands}) }}""",
        **weights,
    )


def test_both_weights_are_transposed_with_a_scale_for_each_gate_and_unit() -> None:
    graph = lstm(2, operands="x, w, r, b", b=normal(2, 8 * HIDDEN))
    ctx = run_pass(graph, *PLANNED, LowerRecurrent())
    check(
        graph,
        """CHECK: graph g
        CHECK-NEXT: %y, %h, %c = com.microsoft.DynamicQuantizeLSTM(%x,
        CHECK-SAME: @w/int8/transposed:i8[2,25,128]
        CHECK-SAME: @r/int8/transposed:i8[2,32,128]
        CHECK-SAME: @b:f32[2,256]
        CHECK-SAME: @w/scale/directions:f32[2,128]
        CHECK-SAME: @w/int8/zero_points:i8[2,128]
        CHECK-SAME: @r/scale/directions:f32[2,128]
        CHECK-SAME: @r/int8/zero_points:i8[2,128]
        CHECK-NOT: DequantizeLinear""",
    )
    constants = graph.constants()
    weight, scale = (array(constants[f"w/{n}"]) for n in ("int8/transposed", "scale/directions"))
    real = weight.astype(np.float32) * scale[:, None]
    exact = np.swapaxes(normal(2, 4 * HIDDEN, INPUTS, seed=1) / 5, 1, 2)
    assert (np.abs(real - exact) <= scale[:, None] / 2 * (1 + 1e-5)).all()
    assert ctx.origins["w/int8/transposed"][0] == ctx.origins["w/scale/directions"][0] == "w"
    for one in weight:  # no two neighbours sum to what int16 does not hold
        first, second = pairs(one.astype(np.int16))
        assert worst_sums(first, second).max() <= PAIR_SUM


STATES: dict[str, Any] = {f"{n}0": normal(2, 3, HIDDEN, seed=i) for i, n in enumerate("hc")}
LENGTHS = np.array([7, 2, 0], np.int32)


@pytest.mark.parametrize(
    "graph",
    [
        lstm(),
        lstm(attrs=', direction = "reverse"'),
        lstm(2),
        lstm(2, operands="x, w, r, b", b=normal(2, 8 * HIDDEN)),
        lstm(2, operands="x, w, r, , lens", lens=LENGTHS),
        lstm(2, operands="x, w, r, , , h0, c0", **STATES),
        lstm(2, operands="x, w, r, , lens, h0, c0", lens=LENGTHS, **STATES),
        lstm(operands="x, w, r, , , , , p", p=normal(1, 3 * HIDDEN)),
        lstm(attrs=", clip = 0.5"),
        lstm(attrs=", input_forget = 1"),
        lstm(attrs=', activations = ["HardSigmoid", "Softsign", "Tanh"], activation_alpha = [0.3]'),
    ],
)
def test_all_forms_are_close_to_the_float_layer(graph: Graph) -> None:
    """Data and state in 255 steps of their range: about 40 dB each; 25 dB with what adds up."""
    feeds = [{"x": normal(steps, 3, INPUTS)} for steps in (1, 7)]
    if "lens" in graph.constants():
        feeds = feeds[1:]
    before = [outputs(graph, feed) for feed in feeds]
    run_pass(graph, *PLANNED, LowerRecurrent())
    assert [n.op for n in graph.nodes] == ["DynamicQuantizeLSTM"]
    for feed, old in zip(feeds, before, strict=True):
        new = outputs(graph, feed)
        assert all(sqnr_db(old[name], new[name]) > 25 for name in old)
    assert optimized_ops(serialize(graph)) == {"com.microsoft.DynamicQuantizeLSTM": 1}


def test_no_steps_give_no_results() -> None:
    graph = lstm(2)
    feed = {"x": np.zeros((0, 3, INPUTS), np.float32)}
    before = outputs(graph, feed)
    run_pass(graph, *PLANNED, LowerRecurrent())
    after = outputs(graph, feed)
    for made in (before, after):
        del made["c"]  # which ONNX Runtime's LSTM leaves unset here, too
    assert_equivalent(before, after, atol=0)


def test_layers_that_share_weights_share_the_integers() -> None:
    graph = parse(
        f"""g (float[T,N,{INPUTS}] a, float[T,N,{INPUTS}] b) => (float y, float z) {{
            y = LSTM<hidden_size = {HIDDEN}>(a, w, r)
            , z = LSTM<hidden_size = {HIDDEN}>(b, w, r) }}""",
        w=normal(1, 4 * HIDDEN, INPUTS),
        r=normal(1, 4 * HIDDEN, HIDDEN),
    )
    run_pass(graph, *PLANNED, LowerRecurrent())
    assert [n.op for n in graph.nodes] == ["DynamicQuantizeLSTM"] * 2
    shapes = [tuple(c.shape) for c in graph.constants().values()]
    assert shapes.count((1, INPUTS, 4 * HIDDEN)) == shapes.count((1, HIDDEN, 4 * HIDDEN)) == 1


QDQ = """
    wd = DequantizeLinear<axis = 0>(wq, s, wz) wr = Reshape(wd, ws)
    rd = DequantizeLinear<axis = 0>(rq, s) rr = Reshape(rd, rs)
    y = LSTM<hidden_size = 32{attrs}>(x, {w}, rr) z = Neg(wr)
"""


@pytest.mark.parametrize(
    ("attrs", "w", "changed", "reason"),
    [
        ("", "w", {}, "only one of its weights is quantized"),
        (', activations = ["Sigmoid", "Relu", "Relu"]', "wr", {}, "without bounds"),
        ("", "wr", {"wz": np.ones(128, np.int8)}, "not symmetric int8 per row"),
        ("", "wr", {"s": np.ones((), np.float32), "wz": np.int8(0)}, "not symmetric int8 per row"),
    ],
)
def test_it_refuses(attrs: str, w: str, changed: dict[str, Array], reason: str) -> None:
    values: dict[str, Array] = {
        "wq": np.ones((128, 25), np.int8),
        "rq": np.ones((128, 32), np.int8),
        "s": np.ones(128, np.float32),
        "wz": np.zeros(128, np.int8),
        "ws": np.array([1, 128, 25]),
        "rs": np.array([1, 128, 32]),
        "w": normal(1, 128, 25),
        **changed,
    }
    body = QDQ.format(attrs=attrs, w=w)
    graph = parse(f"g (float[T,N,25] x) => (float y, float z) {{ {body} }}", **values)
    assert_refused(graph, LowerRecurrent(), reason)


def test_a_float_layer_is_left_alone() -> None:
    graph = lstm()
    ctx = run_pass(graph, LowerRecurrent(), ctx=context())
    assert [n.op for n in graph.nodes] == ["LSTM"] and not ctx.skips
