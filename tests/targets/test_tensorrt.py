"""Target tensorrt on a tiny encoder: symmetric Q/DQ, held to its rules, verified as written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options, QCompileError, Recipe
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import encoder, normal, parse
from qcompile.runtime.session import provider_or_cpu
from qcompile.targets.qdq_requirements import Integers, ZeroPoints
from qcompile.targets.requirements import examine
from qcompile.targets.tensorrt import TENSORRT

LAYERS = 2
LINEARS = 6 * LAYERS
QUANTIZERS = 4 * LAYERS  # of what query, key and value read, of the context, and two of the FFN
OPEN = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
HERE = provider_or_cpu(TENSORRT.provider)


def build(gates: Gates = OPEN, bench: bool = False, **given: Any) -> qcompile.Result:
    """Compiled in no time."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 64, (2, 6)) for _ in range(4)]
    feeds = [{"ids": i, "attention_mask": np.ones_like(i)} for i in ids]
    options = Options(bench=bench, threads=1, bench_rounds=1)
    model, data = serialize(encoder(width=16)), None if "mode" in given else feeds
    chosen: dict[str, Any] = {"target": "tensorrt"} if "recipe" not in given else {}
    return qcompile.compile(model, data, gates=gates, options=options, **chosen, **given)


@pytest.fixture(scope="module")
def compiled() -> qcompile.Result:
    """Timed for a moment, under a latency gate that no model can pass: it must be no gate."""
    return build(Gates(0.98, 0.95, max_latency_ratio=1e-6), bench=True)


def test_every_linear_is_quantized_by_the_rules(compiled: qcompile.Result) -> None:
    report = compiled.report
    assert report.requirements["whole-operands"] == LINEARS + 2 * LAYERS
    assert report.requirements["weight-scales"] == LINEARS + 2 * LAYERS
    proto = onnx.load_from_string(compiled.model)
    constants = proto.graph.initializer
    weights = [t for t in constants if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(weights) == LINEARS
    assert not any(t.data_type == onnx.TensorProto.INT32 for t in constants)
    assert not any(n.domain for n in proto.graph.node)


def test_zero_points_are_there_and_zero(compiled: qcompile.Result) -> None:
    graph = onnx.load_from_string(compiled.model).graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    quantizers = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) == 2 * QUANTIZERS + LINEARS
    for node in quantizers:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()


@pytest.mark.skipif(TENSORRT.provider == HERE, reason="TensorRT is here: nothing is emulated")
def test_the_report_says_that_tensorrt_was_not_here(compiled: qcompile.Result) -> None:
    report = compiled.report
    assert report.provider_missing == "CPUExecutionProvider"
    assert report.operators["QuantizeLinear"] == QUANTIZERS
    notes = " ".join(report.note_texts)
    assert "TensorrtExecutionProvider is not installed here" in notes
    assert "latency was measured on CPUExecutionProvider, not on the target's" in notes
    assert not report.failures


@pytest.mark.skipif(TENSORRT.provider != HERE, reason="no TensorrtExecutionProvider here")
def test_tensorrt_runs_it(compiled: qcompile.Result) -> None:
    assert not compiled.report.provider_missing


def convolution(**given: Any) -> qcompile.Result:
    model = parse(
        """g (float[N,3,8,8] x) => (float[N,2,4,4] y) {
            c = Conv<kernel_shape = [3, 3]>(x, w, b) r = Relu(c) y = Conv(r, v)
        }""",
        w=normal(4, 3, 3, 3),
        b=normal(4),
        v=normal(2, 4, 3, 3, seed=1),
    )
    feeds = [{"x": normal(2, 3, 8, 8, seed=i)} for i in range(3)]
    options = Options(bench=False, threads=1)
    chosen: dict[str, Any] = {"target": "tensorrt"} if "recipe" not in given else {}
    return qcompile.compile(serialize(model), feeds, gates=OPEN, options=options, **chosen, **given)


def test_convolutions_are_quantized_by_output_channel_with_a_float_bias() -> None:
    report = convolution().report
    assert report.requirements["weight-scales"] == report.requirements["float-biases"] == 2
    assert report.operators["QuantizeLinear"] == 2
    assert report.operators["DequantizeLinear"] == 4
    assert report.verdict is not None and report.verdict.outputs[0].mean_cosine > 0.99


def test_one_float_operand_of_a_convolution_keeps_the_other_float() -> None:
    report = convolution(recipe=Recipe(target="tensorrt", precision=(("r", "float"),))).report
    assert report.operators["QuantizeLinear"] == 1
    assert report.operators["DequantizeLinear"] == 2


def test_products_of_attention_are_quantized_where_asked() -> None:
    asked = build(recipe=Recipe(target="tensorrt", attention="all")).report
    # query, key, probabilities, value
    assert asked.operators["QuantizeLinear"] == QUANTIZERS + 4 * LAYERS


def test_a_rule_that_is_missed_is_an_error_that_names_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strange = replace(TENSORRT, requires=(ZeroPoints(), Integers(("int16",))))
    monkeypatch.setattr("qcompile.compiler.stages.prepare.find_target", {"tensorrt": strange}.get)
    with pytest.raises(QCompileError, match=r"integer-types: node .*of int8, expected int16"):
        build()


def test_opsets_are_those_of_its_newest_parser() -> None:
    text, rule = "g (float[N] x) => (float[N] y) { y = Abs(x) }", TENSORRT.requires[:1]
    assert not examine(parse(text, 25), rule).faults
    (fault,) = examine(parse(text, 26), rule).faults
    assert "Abs in opset 26 of ai.onnx, expected ai.onnx to 25" in str(fault)


@pytest.mark.parametrize("float16", [False, True])
def test_quantizers_in_fp8_are_refused_in_one_line(float16: bool) -> None:
    kind = ml_dtypes.float8_e4m3fn
    model = parse(
        """g (float[N,16] x) => (float[N,8] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
            w = DequantizeLinear<axis = 1>(v, t, u) y = MatMul(d, w)
        }""",
        21,
        s=np.array(0.05, np.float32),
        z=np.array(0, kind),
        v=normal(16, 8).astype(kind),
        t=np.full(8, 0.05, np.float32),
        u=np.zeros(8, kind),
    )
    feeds, options = [{"x": normal(2, 16)}], Options(bench=False, threads=1)
    with pytest.raises(QCompileError) as refused:
        qcompile.compile(
            serialize(model), feeds, target="tensorrt", float16=float16, options=options
        )
    message = str(refused.value)
    assert "\n" not in message
    assert "QuantizeLinear of float8_e4m3fn, expected int8 or int4" in message


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_modes_that_it_lacks_are_refused_with_the_reason(mode: str) -> None:
    with pytest.raises(QCompileError, match=f"no mode '{mode}', .* \\(TensorRT"):
        build(mode=mode)


def test_without_data_it_asks_for_some() -> None:
    with pytest.raises(QCompileError, match="needs calibration data"):
        qcompile.compile(serialize(encoder()), target="tensorrt")
