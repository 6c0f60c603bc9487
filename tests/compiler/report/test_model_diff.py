"""``diff``: what differs is shown, what is the same is not; any two files can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.command_line import run

QUICK = "--no-bench", "--threads", 1, "--force"


def built(model: Path, data: Path, name: str, *more: object) -> Path:
    out = model.with_name(f"{name}.onnx")
    done = run("compile", model, "-o", out, "--data", data, *QUICK, *more)
    assert done.exit_code == 0, done.output
    return out


def diff(a: Path, b: Path) -> dict[str, Any]:
    result = run("diff", a, b, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def changes(found: dict[str, Any]) -> dict[str, str]:
    return {t["tensor"]: t["change"] for t in found["tensors"]}


def test_equal_models_say_so(model: Path, data: Path) -> None:
    a, b = built(model, data, "a"), built(model, data, "b")
    assert diff(a, b)["equal"] and diff(model, model)["tensors"] == []
    shown = run("diff", a, b)
    assert shown.exit_code == 0 and shown.stdout.startswith("the same bytes")


def test_decisions_settings_and_sizes_differ(model: Path, data: Path) -> None:
    a, b = built(model, data, "a"), built(model, data, "b", "--keep-float", "wh1")
    found = diff(a, b)
    assert not found["equal"] and found["a"]["report"] and found["a"]["bytes"] < found["b"]["bytes"]
    assert found["settings"]["recipe keep_float"] == {"a": [], "b": ["wh1"]}
    told = {t["tensor"]: t for t in found["tensors"]}
    assert (told["wh1"]["a"]["type"], told["wh1"]["b"]["type"]) == ("int8", "float")
    assert told["r1"]["change"] == "type" and "wh0" not in told
    assert "wh1" in told["wh1"]["b"]["reason"]
    op = found["operators"]["com.microsoft.MatMulIntegerToFloat"]
    assert op["a"] == op["b"] + 1
    shown = run("diff", a, b).stdout
    for word in (
        f"{a.stat().st_size:,} bytes",
        "recipe keep_float",
        "MatMulIntegerToFloat",
        "wh1",
        "int8",
    ):
        assert word in shown, word


def test_scales_and_values_differ(model: Path, data: Path) -> None:
    """Another calibrator gives data other scales; without compensation weights round elsewhere."""
    plain = ("--recipe", "per-tensor", "--target", "qdq")
    a = built(model, data, "a", *plain)
    b = built(model, data, "b", *plain, "--calibrator", "percentile{percentile=99}")
    found = changes(diff(a, b))
    assert found["x0"] == "scale" and "wq0" not in found
    pipeline = json.loads(a.with_name("a.report.json").read_text())["pipeline"]
    c = built(
        model, data, "c", "--target", "qdq", "--pipeline",
        pipeline.replace("insert-qdq", "round-weights,insert-qdq"),
    )  # fmt: skip
    told = {t["tensor"]: t for t in diff(a, c)["tensors"]}
    assert {t["change"] for t in told.values()} == {"values"}
    assert 0 < told["wq0"]["share"] < 1 and told["wq0"]["largest"] >= 1
    shown = run("diff", a, b, "--top", 1).stdout
    assert "tensors: scale" in shown and "more: --top" in shown


def test_files_that_nothing_lies_beside(model: Path, data: Path, tmp_path: Path) -> None:
    a = built(model, data, "a")
    report = a.with_name("a.report.json")
    report.write_text(report.read_text().replace('"model_sha256": "', '"model_sha256": "0'))
    found = diff(model, a)
    assert not found["a"]["report"] and not found["b"]["report"]
    assert changes(found)["wq0"] == "type" and changes(found)["x0"] == "only in b"
    assert found["settings"]["qcompile.target"] == {"a": None, "b": "cpu"}


def test_a_lock_tells_the_recipe_where_there_is_no_report(model: Path, data: Path) -> None:
    a = built(model, data, "a", "--lock", model.with_name("a.lock.yaml"))
    b = built(model, data, "b", "--seed", 7, "--lock", model.with_name("b.lock.yaml"))
    for name in "ab":
        model.with_name(f"{name}.report.json").unlink()
    found = diff(a, b)
    assert found["a"]["lock"] and found["settings"]["recipe seed"] == {"a": 0, "b": 7}
    model.with_name("b.lock.yaml").write_text("format: qcompile lock\n")
    assert not diff(a, b)["b"]["lock"]


def test_only_names_differ(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    proto.producer_name = "someone"
    other = tmp_path / "other.onnx"
    onnx.save(proto, other)
    assert "names or the like differ" in run("diff", model, other).stdout


def test_external_data_is_compared(model: Path, tmp_path: Path) -> None:
    folders = [tmp_path / n for n in "ab"]
    for folder, factor in zip(folders, (1.0, 2.0), strict=True):
        folder.mkdir()
        proto = onnx.load(model)
        weight = next(t for t in proto.graph.initializer if t.name == "wh1")
        values = onnx.numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, "wh1"))
        onnx.save_model(
            proto, folder / "m.onnx", save_as_external_data=True, location="w", size_threshold=256
        )
    a, b = (folder / "m.onnx" for folder in folders)
    assert a.read_bytes() == b.read_bytes()
    assert changes(diff(a, b)) == {"wh1": "values"}
    (folders[1] / "w").unlink()
    missing = run("diff", a, b)
    assert missing.exit_code == 2 and "is missing" in missing.stderr


def test_what_is_no_model_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.onnx", tmp_path / "empty", Path(__file__)):
        result = run("diff", model, path)
        assert result.exit_code == 2 and result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
