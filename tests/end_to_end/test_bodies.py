"""Bodies of If, Loop and Scan are compiled like any graph, and compute what they did."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qcompile
from qcompile import Options
from qcompile.errors import ModelError, TargetError
from qcompile.ir.model_io.bodies import opened, outer_constants
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.subgraph import bodies
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_equivalent, model_proto, normal, outputs
from qcompile.targets.target import Mode

OPTIONS = Options(bench=False, threads=1)
MODES: tuple[Mode, ...] = ("static", "dynamic", "weight-only", "float")
SHARED = """g (float[N,32] x, bool c) => (float[N,32] y) {
    i = If (c) <
        then_branch = yes () => (float[N,32] p) { a = MatMul(x, w) p = Relu(a) },
        else_branch = no () => (float[N,32] q) { b = MatMul(x, w) k = Identity(b) q = Tanh(k) }
    >
    y = MatMul(i, v)
}"""
LOOP = """g (float[N,32] x, int64 n) => (float[N,32] y, float[T,N,32] steps) {
    go = Constant<value = bool {1}>()
    y, steps = Loop (n, go, x) <body = b (int64 i, bool on, float[N,32] h)
        => (bool next, float[N,32] after, float[N,32] step) {
        next = Identity(on)
        m = MatMul(h, w)
        s = Add(m, bias)
        r = Relu(s)
        again = If (on) <
            then_branch = yes () => (float[N,32] p) { p = MatMul(r, w) },
            else_branch = no () => (float[N,32] q) { q = Identity(r) }
        >
        after = Tanh(again)
        step = Identity(after)
    }>
}"""
SCAN = """g (float[N,32] x, float[T,N,32] xs) => (float[N,32] y, float[T,N,32] ys) {
    y, ys = Scan (x, xs) <num_scan_inputs = 1, body = b (float[N,32] h, float[N,32] e)
        => (float[N,32] after, float[N,32] out) {
        m = MatMul(h, w) n = MatMul(e, v) s = Add(m, n) after = Tanh(s) out = Identity(after)
    }>
}"""
WEIGHTS = {"w": normal(32, 32) / 6, "v": normal(32, 32, seed=1) / 6}
GIVEN: dict[str, tuple[str, dict[str, Array], dict[str, Array]]] = {
    "If": (SHARED, WEIGHTS, {"x": normal(4, 32), "c": np.array(True)}),
    "Loop": (
        LOOP,
        {"w": WEIGHTS["w"], "bias": normal(32)},
        {"x": normal(4, 32), "n": np.array(3)},
    ),
    "Scan": (SCAN, WEIGHTS, {"x": normal(4, 32), "xs": normal(5, 4, 32)}),
}


def feeds_of(feed: dict[str, Array]) -> list[dict[str, Array]]:
    """Some feeds; conditions are true and false in turn."""
    return [
        {
            "x": normal(4, 32, seed=k),
            **{name: v for name, v in feed.items() if name != "x"},
            **({"c": np.array(k % 2 == 0)} if "c" in feed else {}),
        }
        for k in range(6)
    ]


def weights_in(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Names and types of the matrices that the file holds."""
    found = [(t.name, numpy_helper.to_array(t).dtype.name) for t in model.graph.initializer]
    shapes = {t.name: t.dims for t in model.graph.initializer}
    return sorted((n, kind) for n, kind in found if len(shapes[n]) >= 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GIVEN)
def test_weights_in_bodies_are_compiled(name: str, mode: Mode) -> None:
    text, weights, feed = GIVEN[name]
    result = qcompile.compile(
        model_proto(text, **weights), feeds_of(feed), mode=mode, options=OPTIONS
    )
    model = onnx.load_from_string(result.model)
    onnx.checker.check_model(model)
    kinds = {kind for _, kind in weights_in(model)}
    expected = {"static": "int8", "dynamic": "int8", "weight-only": "uint8", "float": "float32"}
    assert kinds == {expected[mode]}
    assert result.report.verdict is not None and result.report.verdict.worst_cosine > 0.99


def test_a_weight_of_two_bodies_stays_one_constant() -> None:
    text, weights, feed = GIVEN["If"]
    result = qcompile.compile(model_proto(text, **weights), feeds_of(feed), options=OPTIONS)
    found = weights_in(onnx.load_from_string(result.model))
    assert [name.split("/")[0] for name, _ in found] == ["v", "w"]
    rows = {r.tensor: r for r in result.report.ledger if r.kind == "weight"}
    assert rows["w"].reason == (
        "MatMulIntegerToFloat: uint8 x int8 with the bias inside; mode dynamic in the body of If "
        "'If:i', where no ranges are calibrated"
    )
    assert "mode dynamic" not in rows["v"].reason


def own_weights() -> onnx.ModelProto:
    """Both branches have a constant called w of their own, of different values."""
    model = model_proto(SHARED, **WEIGHTS)
    del model.graph.initializer[0]
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    for body, seed in zip(bodies(node), (5, 6), strict=True):
        body.initializer.append(numpy_helper.from_array(normal(32, 32, seed=seed) / 6, "w"))
        body.initializer.append(numpy_helper.from_array(normal(32, seed=9), body.name + "/bias"))
        body.node[0].output[0] += "/product"
        body.node.add(
            op_type="Add", input=[body.node[0].output[0], body.name + "/bias"], output=["sum"]
        )
        body.node[1].input[0] = "sum"
        body.node.insert(1, body.node.pop())
    return model


def test_constants_of_bodies_move_out_under_names_that_are_unique() -> None:
    graph = from_proto(own_weights())
    feeds = [{"x": normal(4, 32), "c": np.array(c)} for c in (True, False)]
    before = [outputs(graph, feed) for feed in feeds]
    known = outer_constants(graph)
    for body in opened(graph):
        body.put_back(known)
    assert sorted(graph.constants()) == ["v", "w", "w_1"]  # a bias under 1 KiB stays inside
    for old, feed in zip(before, feeds, strict=True):
        assert_equivalent(old, outputs(graph, feed), atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_bodies_with_constants_of_one_name_compute_what_they_did(mode: Mode) -> None:
    feeds = feeds_of(GIVEN["If"][2])
    result = qcompile.compile(own_weights(), feeds, mode=mode, options=OPTIONS)
    assert result.report.verdict is not None and result.report.verdict.worst_cosine > 0.99
    reasons = {r.reason for r in result.report.ledger if r.kind == "weight"}
    assert not [r for r in reasons if "no rule" in r]


def test_equal_constants_of_bodies_become_one() -> None:
    model = own_weights()
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    first, second = bodies(node)
    second.initializer[0].CopyFrom(first.initializer[0])
    graph = from_proto(model)
    known = outer_constants(graph)
    for body in opened(graph):
        body.put_back(known)
    assert len(graph.constants()) == 2


def test_float_bodies_are_simplified() -> None:
    text, weights, feed = GIVEN["If"]
    result = qcompile.compile(
        model_proto(text, **weights), feeds_of(feed), mode="float", options=OPTIONS
    )
    model = onnx.load_from_string(result.model)
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    assert [[n.op_type for n in body.node] for body in bodies(node)] == [
        ["MatMul", "Relu"],
        ["MatMul", "Tanh"],
    ]


def test_a_target_that_needs_ranges_says_so() -> None:
    text, weights, feed = GIVEN["If"]
    result = qcompile.compile(
        model_proto(text, **weights), feeds_of(feed), target="tensorrt", options=OPTIONS
    )
    (reason,) = {r.reason for r in result.report.ledger if r.tensor == "w"}
    assert reason.startswith("target 'tensorrt' quantizes with calibrated ranges only")


def test_keep_float_reaches_into_bodies() -> None:
    text, weights, feed = GIVEN["Loop"]
    result = qcompile.compile(
        model_proto(text, **weights), feeds_of(feed), keep_float=["w"], options=OPTIONS
    )
    (reason,) = {r.reason for r in result.report.ledger if r.tensor == "w"}
    assert reason.startswith("kept float by pattern 'w'")


def test_a_damaged_body_is_named() -> None:
    model = own_weights()
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    next(bodies(node)).node[0].input[0] = "nowhere"
    with pytest.raises(ModelError, match="'nowhere', which nothing produces"):
        qcompile.compile(model, mode="float", options=OPTIONS)


def test_bodies_are_not_ranked_and_sensitivity_says_so() -> None:
    text, weights, feed = GIVEN["Loop"]
    with pytest.raises(TargetError, match="bodies of If, Loop and Scan are not ranked"):
        qcompile.sensitivity(model_proto(text, **weights), feeds_of(feed), options=OPTIONS)


def test_bodies_without_weights_are_not_opened() -> None:
    text = """g (float[N,32] x, bool c) => (float[N,32] y) {
        y = If (c) <
            then_branch = yes () => (float[N,32] p) { a = Identity(x) p = Relu(a) },
            else_branch = no () => (float[N,32] q) { q = Neg(x) }
        >
    }"""
    assert not list(opened(from_proto(model_proto(text))))


def test_weights_are_dequantized_outside_once() -> None:
    """ONNX Runtime cannot load a body whose DequantizeLinear reads an outer weight."""
    text, weights, feed = GIVEN["If"]
    result = qcompile.compile(
        model_proto(text, **weights), feeds_of(feed), target="qdq", options=OPTIONS
    )
    model = onnx.load_from_string(result.model)
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    assert [[n.op_type for n in body.node] for body in bodies(node)] == [
        ["MatMul", "Relu"],
        ["MatMul", "Tanh"],
    ]
    (shared,) = {n.input[1] for body in bodies(node) for n in body.node if n.op_type == "MatMul"}
    (maker,) = (n for n in model.graph.node if shared in n.output)
    assert maker.op_type == "DequantizeLinear"
