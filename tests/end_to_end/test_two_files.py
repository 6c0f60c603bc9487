"""Models over protobuf's limit: a file of weights beside the model, through every command.

The limit is lowered here; benchmarks/memory_cost.py makes models of real size.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Options
from qcompile.errors import OutputError
from qcompile.ir.model_io import write_model
from qcompile.ir.model_io.read_model import load
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.session import Session
from tests.command_line import run

ROWS = 64
QUICK = Options(bench=False, threads=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two linears, their weights in a file beside the model."""
    text = """mlp (float[batch,64] x) => (float[batch,64] y) {
        h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"""
    found = model_proto(text, w1=normal(ROWS, ROWS) / 8, w2=normal(ROWS, ROWS, seed=1) / 8)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "mlp.onnx"
    onnx.save(found, path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((32, ROWS)).astype(np.float32))
    return tmp_path / "x.npz"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_model, "PROTOBUF_LIMIT", 5000)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.usefixtures("small")
def test_every_command_takes_what_compile_writes(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "q.onnx"
    out.parent.mkdir()
    made = run("compile", model, "-o", out, "--data", data, "--no-bench", "--threads", 1, "-q")
    assert made.exit_code == 0, made.output
    weights, *rest = names(out.parent)
    assert weights.startswith("q-") and weights.endswith(".data")
    assert rest == ["q.onnx", "q.report.json"]

    seen = json.loads(run("inspect", out, "--json").output)
    size = out.stat().st_size + (out.parent / weights).stat().st_size
    assert seen["bytes"] == size == sum(row["bytes"] for row in seen["ledger"])
    report = json.loads((out.parent / "q.report.json").read_text())
    assert report["bytes"] == size and seen["ledger"] == report["ledger"]

    assert run("verify", model, out, "--data", data).exit_code == 0
    timed = run("bench", model, out, "--rounds", 1, "--seconds", 0.01, "--json", "-")
    assert timed.exit_code == 0, timed.output
    again = run("compile", out, "-o", tmp_path / "again.onnx", "--mode", "float", "--no-bench")
    assert again.exit_code == 0, again.output


def test_one_file_and_two_are_the_same_model(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = {"x": np.load(data)["x"]}
    whole = qcompile.compile(model, str(data), options=QUICK)
    monkeypatch.setattr(write_model, "PROTOBUF_LIMIT", 5000)
    parted = qcompile.compile(model, str(data), options=QUICK)
    assert whole.written.data is None and parted.written.data is not None
    one, two = (Session(made.written.path).run(x)["y"] for made in (whole, parted))
    assert np.array_equal(one, two)
    assert len(whole.model) == whole.report.bytes < parted.report.bytes


@pytest.mark.usefixtures("small")
def test_data_of_the_model_that_was_there_goes(model: Path, data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out" / "q.onnx", tmp_path / "out" / "other-0123456789ab.data"
    out.parent.mkdir()
    other.write_bytes(b"precious")
    for mode in ("static", "float", "static"):
        options = Options(bench=False, threads=1, stem="q")
        made: Any = qcompile.compile(model, str(data), mode=mode, options=options)
        made.save(out)
        assert names(out.parent) == [other.name, made.written.data.name, "q.onnx"]
        load(out)


@pytest.mark.usefixtures("small")
def test_both_files_or_none(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old model keeps its data where the new one cannot be written."""
    out = tmp_path / "out" / "q.onnx"
    out.parent.mkdir()
    options = Options(bench=False, threads=1, stem="q")
    old = qcompile.compile(model, str(data), options=options)
    new = qcompile.compile(model, str(data), mode="float", options=options)
    copies: list[Path] = []

    def full(source: Path, path: Path) -> None:
        copies.append(path)
        if len(copies) == 2:
            raise OutputError(f"cannot write: {errno.errorcode[errno.ENOSPC]}")
        real(source, path)

    old.save(out)
    before: dict[str, Array | bytes] = {p.name: p.read_bytes() for p in out.parent.iterdir()}
    real = write_model._copy
    monkeypatch.setattr(write_model, "_copy", full)
    with pytest.raises(OutputError, match="ENOSPC"):
        new.save(out)
    assert len(copies) == 2
    assert {p.name: p.read_bytes() for p in out.parent.iterdir()} == before


def test_the_runtime_maps_the_float_model(tmp_path: Path, model: Path) -> None:
    """A file with its weights inside is written apart for the runtime, for as long as is needed."""
    whole = tmp_path / "whole.onnx"
    onnx.save(onnx.load(model), whole)
    made = write_model.externalize_weights(whole)
    assert made is not None and made.path.stat().st_size < 2000
    x = {"x": np.ones((2, ROWS), np.float32)}
    assert np.array_equal(Session(made.path).run(x)["y"], Session(whole).run(x)["y"])
    assert write_model.externalize_weights(model) is None
