"""ONNX Runtime quantizes data where a model only has dequantized weights: the report says so."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qcompile
from qcompile.compiler.stages.options import CompileOptions
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.session import FLOAT_DATA
from qcompile.targets.target import Mode
from tests.newer_runtime import INSTALLED

CODE = "data-quantized-by-runtime"
WIDTH = 64


def model() -> onnx.ModelProto:
    text = f"""g (float[B,{WIDTH}] x) => (float[B,{WIDTH}] y) {{
        y = MatMul(x, w)
    }}"""
    return model_proto(text, w=normal(WIDTH, WIDTH))


def notes(target: str, mode: Mode) -> dict[str, str]:
    result = qcompile.compile(
        model(), target=target, mode=mode, options=CompileOptions(bench=False)
    )
    return {note.code: note.text for note in result.report.notes}


FUSES = pytest.mark.skipif(
    INSTALLED < (1, 25), reason="until 1.25 these products stayed as written"
)


@FUSES
def test_the_products_that_the_runtime_fuses_are_counted() -> None:
    text = notes("qdq", "weight-only")[CODE]
    assert "MatMulNBits (1 here)" in text and "=".join(FLOAT_DATA) in text


@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_operators_that_were_written_are_not(target: str) -> None:
    mode: Mode = "weight-only" if target == "cpu" else "float"
    assert CODE not in notes(target, mode)


@FUSES
def test_the_option_that_the_note_names_keeps_data_float() -> None:
    options = CompileOptions(bench=False)
    result = qcompile.compile(model(), target="qdq", mode="weight-only", options=options)
    data = result.model
    feed = {"x": normal(3, WIDTH, seed=7)}
    written = run(data, feed, optimize=False)
    as_usual = run(data, feed)
    kept = run(data, feed, FLOAT_DATA)
    # Sums of WIDTH products in another order, twice.
    tolerance = 2 * WIDTH * 2.0**-24 * float(np.abs(written).max())
    assert np.abs(kept - written).max() <= tolerance < np.abs(as_usual - written).max()


def run(
    data: bytes, feed: dict[str, Array], *entries: tuple[str, str], optimize: bool = True
) -> Array:
    native = ort.SessionOptions()
    native.log_severity_level = 4
    if not optimize:
        native.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in entries:
        native.add_session_config_entry(key, value)
    (found,) = ort.InferenceSession(data, native).run(None, feed)
    return np.asarray(found)
