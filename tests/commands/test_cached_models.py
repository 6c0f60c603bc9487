"""Every command takes a model of the hub's cache: file and external data are links to blobs."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

import qcompile
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.hub_cache import written_snapshot

QUICK = ("--rounds", 1, "--seconds", 0.01)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """onnx/model.onnx with its weights in onnx/model.onnx_data."""
    return written_snapshot(tmp_path, threshold=1024)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a b c\nd e f g h\n")
    return path


@pytest.mark.parametrize("part", ["", "onnx", "onnx/model.onnx"])
def test_commands_read_the_blobs(snapshot: Path, text: Path, tmp_path: Path, part: str) -> None:
    model, out = snapshot / part, tmp_path / "out.onnx"
    size = sum((snapshot / "onnx" / f"model.onnx{end}").stat().st_size for end in ("", "_data"))
    assert json.loads(run("inspect", model, "--json").stdout)["bytes"] == size
    assert "the same bytes" in run("diff", model, model).stdout
    (timed,) = json.loads(run("bench", model, *QUICK, "--json").stdout)
    assert len(timed["models"]) == 1
    assert json.loads(run("verify", model, model, "--data", text, "--json").stdout)["passed"]
    args = ("--data", text, "--by", "role", "--measure", "alone", "--json")
    assert json.loads(run("sensitivity", model, *args).stdout)["rows"]
    options = qcompile.Options(bench=False, force=True, tokenizer=snapshot)
    result = qcompile.compile(model, text, options=options)
    result.save(out)
    assert 0 < out.stat().st_size < size


@pytest.mark.parametrize("command", ["inspect", "bench", "compile"])
def test_data_behind_a_link_out_of_the_cache_is_refused(
    snapshot: Path, tmp_path: Path, command: str
) -> None:
    data = snapshot / "onnx" / "model.onnx_data"
    secret = data.resolve().rename(tmp_path / "secret")
    data.unlink()
    data.symlink_to(secret)
    args = ("-o", tmp_path / "out.onnx") if command == "compile" else ()
    done = run(command, snapshot / "onnx" / "model.onnx", *args)
    assert_one_line(done, 2, "points outside the model's folder: 'model.onnx_data'")


def test_a_location_may_not_leave_the_folder_within_the_cache(snapshot: Path) -> None:
    model = snapshot / "onnx" / "model.onnx"
    blob = model.with_name("model.onnx_data").resolve()
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            named = f"../../../blobs/{blob.name}"
            entry.value = named if entry.key == "location" else entry.value
    model.resolve().write_bytes(proto.SerializeToString())
    assert_one_line(run("inspect", model), 2, "points outside the model's folder")
