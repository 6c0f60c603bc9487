"""Option float16: integers with float16 between them, on targets tensorrt and qdq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import qcompile
from qcompile import Gates, Options, QCompileError, Recipe
from qcompile.commands.cli import main
from qcompile.compiler.stages.models import in_float32
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder, normal, parse
from qcompile.runtime.evaluation.float16_emulation import rounding_form
from qcompile.runtime.session import Session, SessionOptions
from tests.newer_runtime import INSTALLED

OPEN = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
# Where every tensor is quantized, float16 moves values that lie between two integers to the other
# one; such a step is as large as the rounding noise of the integers themselves, 1 - .9989 here.
CLOSE = {"tensorrt": 0.9995, "qdq": 0.9978}
AS_WRITTEN = SessionOptions(optimize=False)
HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def build(model: bytes, feeds: Any, **given: Any) -> qcompile.Result:
    options = Options(bench=False, threads=1)
    chosen: dict[str, Any] = {} if "recipe" in given else {"float16": True}
    return qcompile.compile(model, feeds, gates=OPEN, options=options, **chosen, **given)


def sentences() -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 64, (2, 6)) for _ in range(4)]
    return [{"ids": i, "attention_mask": np.ones_like(i)} for i in ids]


@pytest.fixture(scope="module", params=["tensorrt", "qdq"])
def compiled(request: Any) -> qcompile.Result:
    return build(serialize(encoder(width=16)), sentences(), target=request.param)


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_outputs_are_those_of_float32_between_the_same_integers(compiled: qcompile.Result) -> None:
    wide, feed = in_float32(compiled.model), sentences()[0]
    reference = Session(wide.path, AS_WRITTEN).run(feed)
    rounded = Session(rounding_form(compiled.model), AS_WRITTEN).run(feed)
    for name, values in reference.items():
        assert values.dtype == rounded[name].dtype == np.float32
        assert cosine(values, rounded[name]) > CLOSE[compiled.report.target]


@pytest.mark.skipif(INSTALLED < (1, 30), reason="until 1.30 QuantizeLinear truncated float16")
def test_onnx_runtime_runs_it_with_the_same_outputs(compiled: qcompile.Result) -> None:
    """Fused, and computed in float32 with casts in between, which rounds less often."""
    feed = sentences()[0]
    here = Session(compiled.model).run(feed)
    for name, values in Session(rounding_form(compiled.model), AS_WRITTEN).run(feed).items():
        assert cosine(values, here[name]) > CLOSE[compiled.report.target]


def test_scales_and_biases_are_float16(compiled: qcompile.Result) -> None:
    graph = onnx.load_from_string(compiled.model).graph
    constants = {t.name: t for t in graph.initializer}
    kinds = {n.name: n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    scales = [constants[node.input[1]] for node in kinds.values()]
    assert scales and all(t.data_type == HALF for t in scales)
    assert all((onnx.numpy_helper.to_array(t) > 0).all() for t in scales)
    large = [t for t in graph.initializer if t.data_type == FLOAT and np.prod(t.dims) > 1]
    assert not large


def test_reports_say_how_it_was_compared() -> None:
    report = build(serialize(encoder(width=16)), sentences(), target="qdq").report
    assert "float16-emulated" in {note.code for note in report.notes}
    assert report.recipe.float16


LAYER = """g (float[B,16] x) => (float[B,8] y) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }"""


def layer(**changed: Array) -> bytes:
    known: dict[str, Array] = {
        "w": normal(16, 8) / np.float32(200),
        "b": normal(8) * np.float32(50),
        **changed,
    }
    return serialize(parse(LAYER, **known))


def rows(scale: float = 1) -> list[dict[str, Array]]:
    return [{"x": normal(8, 16, seed=i) * np.float32(scale)} for i in range(4)]


def test_biases_are_kept_from_int32_that_onnx_runtime_computes_in_float16() -> None:
    """Without its Sum the bias, divided by both scales, is infinite in float16."""
    feeds, model = rows(0.01), layer()
    expected = Session(model).run(feeds[3])["y"]
    good = build(model, feeds, target="qdq", outputs=["y"])
    assert cosine(Session(good.model).run(feeds[3])["y"], expected) > 0.999
    pipeline = ",".join(
        p for p in good.report.pipeline.split(",") if p not in ("shield-floats", "shield-groups")
    )
    recipe = Recipe(target="qdq", pipeline=pipeline, float16=True)
    bad = build(model, feeds, recipe=recipe)
    verdict = bad.report.verdict
    assert verdict is not None and verdict.worst_cosine < 0.9


def test_values_beyond_float16_stay_float32() -> None:
    """With both operands of the product, as a Cast between them would prevent its int8 kernel."""
    text = """g (float[B,16] x) => (float[B,8] y) {
        m = MatMul(x, w) n = LayerNormalization(m, g, b) y = MatMul(n, v)
    }"""
    w, v = normal(16, 8) * np.float32(3000), normal(8, 8, seed=1)
    model = serialize(parse(text, w=w, v=v, g=normal(8, seed=2), b=normal(8, seed=3)))
    result = build(model, rows(30), target="tensorrt")
    skips = {s.node: s.reason for s in result.report.skips if s.pass_name == "halve-floats"}
    assert "'m' reaches" in skips["MatMul:m"] and "float16 ends at 65,504" in skips["MatMul:m"]
    assert sum("'MatMul:m' computes in float32" in reason for reason in skips.values()) == 2
    verdict = result.report.verdict
    assert verdict is not None and verdict.worst_cosine > 0.99


@pytest.mark.parametrize("mode", ["weight-only", "float"])
def test_other_modes_of_qdq(mode: str) -> None:
    feeds, model = rows(), layer()
    result = build(model, feeds, target="qdq", mode=mode)
    expected, found = (Session(m).run(feeds[0])["y"] for m in (model, result.model))
    assert cosine(expected, found) > 0.999
    graph = onnx.load_from_string(result.model).graph
    assert not any(t.data_type == FLOAT and np.prod(t.dims) > 1 for t in graph.initializer)


def test_cpu_refuses_it_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(QCompileError, match=r"target 'cpu' has no float16 .*leave out --float16"):
        build(layer(), rows(), target="cpu")
    path = tmp_path / "m.onnx"
    path.write_bytes(layer())
    out = str(tmp_path / "o.onnx")
    found = CliRunner().invoke(main, ["compile", str(path), "-o", out, "--float16", "-q"])
    assert found.exit_code == 2 and "target 'cpu' has no float16" in found.output


def test_a_pipeline_without_the_pass_is_refused() -> None:
    recipe = Recipe(target="qdq", pipeline="plan-operands,insert-qdq", float16=True)
    with pytest.raises(QCompileError, match="float16 needs the pass 'halve-floats'"):
        build(layer(), rows(), recipe=recipe)
