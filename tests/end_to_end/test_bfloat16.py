"""Models whose inputs and outputs are bfloat16: fed, compiled and compared by every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import qcompile
from qcompile import DataError, Options
from qcompile.commands.cli import main
from qcompile.compiler.stages.models import needs_float32
from qcompile.data.feeds import InputSpec, check_feed
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import Session

B = ml_dtypes.bfloat16
W, V = (normal(64, 128) / 8).astype(B), (normal(128, 32, seed=1) / 11).astype(B)
TEXT = (
    "g (bfloat16[B,64] x) => (bfloat16[B,32] y) { m = MatMul(x, w) r = Relu(m) y = MatMul(r, v) }"
)
MODEL = serialize(parse(TEXT, w=W, v=V))
X = [normal(8, 64, seed=i).astype(B) for i in range(4)]
SPEC = InputSpec("x", np.dtype(B), (None, 64))


@pytest.mark.parametrize("kind", [np.float32, np.float16, B])
def test_floats_are_rounded_to_bfloat16(kind: Any) -> None:
    values = X[0].astype(kind)
    found = check_feed({"x": values}, [SPEC], "here")["x"]
    assert found.dtype == B and np.array_equal(found, X[0])


def test_records_of_numpy_files_are_bfloat16(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X[0])
    with np.load(tmp_path / "x.npz") as stored:
        found = check_feed(stored, [SPEC], "here")["x"]
    assert np.array_equal(found, X[0])


def test_integers_are_no_bfloat16() -> None:
    with pytest.raises(DataError, match="found dtype int64, expected bfloat16"):
        check_feed({"x": np.zeros((2, 64), np.int64)}, [SPEC], "here")


def test_sessions_give_float32_for_bfloat16() -> None:
    text = """g (bfloat16[B,64] x) => (bfloat16[B,64] y, float[B,64] z) {
        z = Cast<to = 1>(x) y = Cast<to = 16>(z)
    }"""
    session = Session(serialize(parse(text)))
    for given in (X[0], X[0].astype(np.float32)):
        found = session.run({"x": given})
        assert found["y"].dtype == found["z"].dtype == np.float32
        assert np.array_equal(found["y"], X[0].astype(np.float32))
        session.call({"x": given})
    assert session.run({"x": X[0][:0]})["y"].shape == (0, 64)


@pytest.mark.parametrize(
    "way",
    [
        {"target": "cpu"},
        {"target": "cuda"},
        {"target": "tensorrt", "float16": True},
        {"target": "qdq", "float16": True},
    ],
    ids=lambda way: way["target"],
)
def test_every_target_keeps_inputs_and_outputs(way: dict[str, Any]) -> None:
    feeds = [{"x": x} for x in X]
    result = qcompile.compile(MODEL, feeds, options=Options(bench=False), **way)
    verdict = result.report.verdict
    assert verdict is not None and verdict.worst_cosine > 0.99
    assert "bfloat16-raised" in {note.code for note in result.report.notes}
    found = Session(result.model).run({"x": X[0]})["y"]
    expected = np.maximum(X[0].astype(np.float32) @ W.astype(np.float32), 0) @ V.astype(np.float32)
    assert np.square(found - expected).sum() < 1e-2 * np.square(expected).sum()


def run(*args: str) -> str:
    found = CliRunner().invoke(main, list(args))
    assert found.exit_code == 0, found.output
    return found.output


def test_commands_run_it_in_float32(tmp_path: Path) -> None:
    model, data, out = (str(tmp_path / name) for name in ("m.onnx", "x.npz", "out.json"))
    Path(model).write_bytes(MODEL)
    np.savez(data, x=X[0].astype(np.float32))
    assert "computes in bfloat16" in run("verify", model, model, "--data", data)
    assert "file" in run("inspect", model)
    text = run("bench", model, model, "--rounds", "1", "--seconds", "0.01", "--json", out)
    assert "computes in bfloat16" in text
    assert len(json.loads(Path(out).read_text())) == 1


def model_of(body: str, **weights: Array) -> bytes:
    return serialize(parse(f"g (bfloat16[B,64] x) => (bfloat16[B,64] y) {{ {body} }}", **weights))


def test_only_arithmetic_in_bfloat16_needs_float32() -> None:
    assert needs_float32(model_of("y = Relu(x)"))
    assert not needs_float32(model_of("f = Cast<to = 1>(x) r = Relu(f) y = Cast<to = 16>(r)"))
