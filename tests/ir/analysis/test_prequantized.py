"""What came in quantized is recognised, left alone, and said; what is float is completed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Options
from qcompile.ir import Graph, array
from qcompile.ir.analysis.prequantized import (
    constant_bias,
    has_quantizer,
    inventory,
    is_quantized_next,
    is_quantized_weight,
    scale_arithmetic,
)
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import serialize
from qcompile.ir.printer import dump
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder, normal, parse
from qcompile.targets.target import Mode
from tests.passes.corpus import quantized

F32 = np.float32
UNTIMED = Options(bench=False)
Feed = dict[str, Array]


def stored(body: str) -> Graph:
    """A product with a weight that is stored as integers."""
    return parse(
        f"g (float[B,8] x) => (float[B,6] y) {{ {body} }}",
        q=np.random.default_rng(0).integers(-127, 128, (8, 6), np.int8),
        s=np.full(6, 0.01, F32),
        z=np.zeros(6, np.int8),
        w=normal(6, 6),
    )


BY_CAST = "c = Cast<to = 1>(q) v = Mul(c, s) m = MatMul(x, v)"
BY_QDQ = "v = DequantizeLinear<axis = 1>(q, s, z) m = MatMul(x, v)"


@pytest.mark.parametrize(
    ("body", "found"), [(BY_CAST, "1 integer weights with Cast"), (BY_QDQ, "1 DequantizeLinear")]
)
def test_integer_weights_are_recognised(body: str, found: str) -> None:
    graph = stored(f"{body} y = Relu(m)")
    assert inventory(graph) == found
    assert is_quantized_weight(graph, graph.tensors()["v"])
    assert not is_quantized_weight(graph, graph.tensors()["m"])


def test_operators_are_counted() -> None:
    assert inventory(quantized()) == (
        "3 DequantizeLinear, 1 DynamicQuantizeLinear, 1 MatMulInteger, 2 QuantizeLinear"
    )
    assert inventory(stored("m = Cast<to = 1>(z) y = MatMul(w, m)")) == ""


@pytest.mark.parametrize("body", [BY_CAST, BY_QDQ])
@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_integer_weights_stay_and_float_ones_are_completed(target: str, body: str) -> None:
    graph = stored(f"{body} r = Relu(m) y = MatMul(r, w)")
    feeds = [{"x": normal(4, 8, seed=i)} for i in range(4)]
    result = qcompile.compile(serialize(graph), feeds, target=target, options=UNTIMED)
    names = {t.name for t in onnx.ModelProto.FromString(result.model).graph.initializer}
    assert {"q", "s", "w/int8"} <= names
    assert [s.reason for s in result.report.skips if s.pass_name == "plan-operands"] == [
        "its weight is already quantized in the input model"
    ]
    assert result.report.note_texts[0].startswith("the input model is already quantized: 1 ")


def test_a_model_that_is_quantized_throughout_comes_out_as_it_is() -> None:
    graph = stored(f"{BY_CAST} y = Relu(m)")
    result = qcompile.compile(serialize(graph), options=UNTIMED)
    assert dump(load(result.model)) == dump(graph)
    assert result.report.note_texts[0] == (
        "the input model is already quantized: 1 integer weights with Cast keep their integers "
        "and scales"
    )
    assert not any("nothing was quantized" in note for note in result.report.note_texts)


def test_what_stays_float_beside_integers_has_its_reason() -> None:
    graph = stored(f"{BY_CAST} r = Relu(m) y = MatMul(r, w)")
    result = qcompile.compile(serialize(graph), keep_float=["w"], options=UNTIMED)
    assert result.report.note_texts[1] == (
        "nothing was quantized: except for what was already quantized, kept float by pattern 'w'"
    )


def test_bfloat16_weights_are_no_integers() -> None:
    bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    graph = parse(
        "g (float[B,8] x) => (float[B,6] y) { v = Cast<to = 1>(w) y = MatMul(x, v) }",
        w=normal(8, 6).astype(bfloat16),
    )
    assert inventory(graph) == ""
    assert not is_quantized_weight(graph, graph.tensors()["v"])


def test_quantizers_around_data_are_recognised() -> None:
    graph = quantized()
    tensors = graph.tensors()
    assert has_quantizer(graph, tensors["d"])
    assert not has_quantizer(graph, tensors["e"])  # a weight
    assert not has_quantizer(graph, tensors["f"])
    assert is_quantized_next(graph, tensors["m"])
    assert not is_quantized_next(graph, tensors["a"])


def test_a_bias_of_integers_is_a_constant_in_float() -> None:
    graph = parse(
        """g (float[B,3] x) => (float[B,3] y) {
            b = DequantizeLinear<axis = 0>(q, s)
            y = Add(x, b)
        }""",
        q=np.array([1, -2, 3], np.int32),
        s=np.array([0.5, 0.25, 2], np.float32),
    )
    bias = constant_bias(graph, graph.tensors()["b"])
    assert array(bias).tolist() == [0.5, -0.5, 6]
    assert constant_bias(graph, graph.tensors()["x"]) is graph.tensors()["x"]


def test_scales_of_a_dynamic_product_are_no_data() -> None:
    graph = parse(
        """g (float[B,8] x, float[6] s, float[6] b) => (float[B,6] y) {
            a, t, z = DynamicQuantizeLinear(x)
            i = MatMulInteger(a, q, z)
            m = Mul(t, s)
            c = Cast<to = 1>(i)
            p = Mul(c, m)
            r = Relu(p)
            y = Add(r, b)
        }""",
        q=np.random.default_rng(0).integers(0, 9, (8, 6), np.uint8),
    )
    assert scale_arithmetic(graph) == {"t", "s", "m", "c"}
    feeds = [
        {"x": normal(4, 8, seed=i), "s": normal(6, seed=i), "b": normal(6, seed=i)}
        for i in range(4)
    ]
    result = qcompile.compile(serialize(graph), feeds, target="qdq", options=UNTIMED)
    reasons = {r.tensor: r.reason for r in result.report.ledger if r.kind == "activation"}
    assert reasons["m"] == reasons["s"] == "a scale of a tensor that is already quantized"


# Our own output ------------------------------------------------------------------------------


def sentences() -> list[Feed]:
    rng = np.random.default_rng(0)
    mask = np.ones((4, 8), np.int64)
    return [{"ids": rng.integers(0, 64, (4, 8)), "attention_mask": mask} for _ in range(4)]


@pytest.mark.parametrize(
    ("target", "mode"),
    [("cpu", "static"), ("cpu", "dynamic"), ("cpu", "weight-only"), ("qdq", "static")],
)
def test_compiling_again_changes_nothing(target: str, mode: Mode) -> None:
    source, feeds = serialize(encoder(1)), sentences()
    once = qcompile.compile(source, feeds, target=target, mode=mode, options=UNTIMED)
    again = qcompile.compile(once.model, feeds, target=target, mode=mode, options=UNTIMED)
    assert dump(load(again.model)) == dump(load(once.model))
    assert f"by qcompile {qcompile.__version__} for target {target}" in again.report.note_texts[0]


def test_scales_per_channel_stay_shielded_on_another_target() -> None:
    """Without its Sum, ONNX Runtime fuses what it cannot run."""
    source, feeds = serialize(encoder(1, outlier=30)), sentences()
    once = qcompile.compile(source, feeds, target="qdq", options=UNTIMED)
    for mode in ("static", "dynamic", "float"):
        again = qcompile.compile(once.model, feeds, target="cpu", mode=mode, options=UNTIMED)
        assert again.report.failures == []


# Other tools' output -------------------------------------------------------------------------


class Reader:
    """Feeds for onnxruntime's calibration."""

    def __init__(self) -> None:
        self.left = iter(sentences())

    def get_next(self) -> Feed | None:
        return next(self.left, None)


@pytest.mark.parametrize("target", ["cpu", "qdq"])
@pytest.mark.parametrize("form", ["dynamic", "dynamic in part", "Q/DQ", "operators"])
def test_outputs_of_onnxruntimes_quantizers(
    tmp_path: Path, form: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    monkeypatch.setattr("logging.root.manager.disable", 60)
    source, out = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    source.write_bytes(serialize(encoder(1)))
    if form.startswith("dynamic"):
        rest = ["MatMul:fm0", "MatMul:hm0"] if form == "dynamic in part" else []
        quantization.quantize_dynamic(source, out, nodes_to_exclude=rest)
    else:
        kind = getattr(quantization.QuantFormat, "QDQ" if form == "Q/DQ" else "QOperator")
        uint8 = quantization.QuantType.QUInt8
        quantization.quantize_static(
            source, out, Reader(), quant_format=kind, activation_type=uint8
        )
    result = qcompile.compile(out, sentences(), target=target, mode="static", options=UNTIMED)
    assert result.report.failures == []
    assert result.report.note_texts[0].startswith("the input model is already quantized: ")
    weights = (r for r in result.report.ledger if r.kind == "weight" and r.sqnr_db)
    completed = {r.tensor.partition("/")[0] for r in weights}
    assert ("wf0" in completed) == (form == "dynamic in part")
