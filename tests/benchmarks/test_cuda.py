"""The benchmark of the CUDA provider: rehearsed on the CPU, and run where there is a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import cuda
from benchmarks._bound_session import _elsewhere, placement
from qcompile.data.synthetic import synthetic_feeds
from qcompile.ir.model_io.read_model import load
from qcompile.runtime.session import CPU, CUDA, provider_or_cpu
from tests.encoder_files import save_encoder

NO_GPU = provider_or_cpu(CUDA) != CUDA
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the benchmark on a small encoder; its figures."""

    def call(*arguments: str) -> dict[str, Any]:
        model, figures = save_encoder(tmp_path / "m.onnx"), tmp_path / "figures.json"
        small = ["--batches", "1,2", "--length", "8", "--rounds", "2", "--seconds", "0.01"]
        command = ["cuda", str(model), *small, "--json", str(figures), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        cuda.main()
        found: dict[str, Any] = json.loads(figures.read_text()) if figures.is_file() else {}
        return found

    return call


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == {}
    assert capsys.readouterr().out.startswith("no GPU here: onnxruntime")


def test_every_model_is_rehearsed_on_the_cpu(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    models = run("--provider", CPU)["models"]
    float32 = models[0]
    assert float32["name"] == cuda.FLOAT and len(models) == 5
    assert float32["cosine"] == pytest.approx(1) and float32["elsewhere"] == {}
    assert {size: len(ms) for size, ms in float32["milliseconds"].items()} == {"1": 2, "2": 2}
    for row in models:
        assert row["failure"] or row["cosine"] > 0.9
    shown = capsys.readouterr().out
    assert "| float32 |" in shown and "8 tokens, 2 rounds" in shown


def test_a_model_that_does_not_run_has_the_reason(tmp_path: Path) -> None:
    node = helper.make_node("Unknown", ["x"], ["y"], domain="nowhere")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)]
    model = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), model)
    row = cuda.Row("other", model)
    cuda.examine(row, cuda.Inputs({1: {}}, [{}]), model, CPU)
    assert "nowhere:Unknown" in row.failure and row.path is None
    assert "nowhere:Unknown" in cuda.table([row], [1])


def test_nodes_elsewhere_are_named() -> None:
    def event(name: str, op: str, provider: str) -> dict[str, Any]:
        return {"cat": "Node", "name": name, "args": {"op_name": op, "provider": provider}}

    events = [
        event("a_kernel_time", "MatMul", CUDA),
        event("b_kernel_time", "Erf", CPU),
        event("b_kernel_time", "Erf", CPU),  # of another run
        event("c_kernel_time", "MemcpyToHost", CUDA),
        {"cat": "Session", "name": "model_run"},
    ]
    assert _elsewhere(events, CUDA) == (3, {"Erf": 1, "MemcpyToHost": 1})


def test_a_profile_says_where_nodes_run(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "m.onnx")
    feed = synthetic_feeds(load(model), {}, 1, 0, length=8)[0]
    nodes, elsewhere = placement(model, CPU, feed)
    assert nodes > 10 and elsewhere == {}


@pytest.mark.skipif(NO_GPU, reason="no GPU that ONNX Runtime's CUDA provider runs on")
def test_on_a_gpu_only_shape_arithmetic_is_elsewhere(run: Run) -> None:
    shapes = {"Shape", "Gather", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Cast"}
    for row in run()["models"]:
        if row["name"].startswith("qcompile"):
            assert not row["failure"] and set(row["elsewhere"]) <= shapes
