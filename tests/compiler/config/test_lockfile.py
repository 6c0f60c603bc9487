"""Locks: the same bytes without data, whatever else changes; what changed is named in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import yaml
from click.testing import Result
from threadpoolctl import threadpool_limits

import qcompile
from qcompile import Options, Recipe
from qcompile.compiler.config import lockfile
from qcompile.errors import OutputError, RecipeError
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.rewriting.testing import encoder
from tests.command_line import assert_one_line, run
from tests.encoder_files import save_tokens

QUICK = Options(bench=False, threads=1, keep_calibration=True)


def locked(model: Path, data: Path, *more: object) -> tuple[Path, Path]:
    """Compile with a lock: output and lock."""
    out, file = model.with_name("out.onnx"), model.with_name("out.lock.yaml")
    given = ("compile", model, "-o", out, "--no-bench", "--threads", 1, "--lock", file)
    done = run(*given, "--data", data, *more)
    assert done.exit_code == 0, done.output
    assert (".npz (" in done.output) == file.with_suffix(".npz").exists()  # its size is told
    return out, file


def again(model: Path, file: Path, *more: object) -> Result:
    return run("compile", model, "-o", model.with_name("again.onnx"), "--recipe", file, *more)


BUILDS = {
    "cpu": (),
    "cpu fast": ("--recipe", "fast", "--min-cosine", 0.9, "--min-worst-cosine", 0.5),
    "qdq": ("--target", "qdq"),
    "percentile": ("--calibrator", "percentile{percentile=99.9}"),
    "dynamic": ("--mode", "dynamic"),
    "weight-only": ("--mode", "weight-only"),
    "float": ("--mode", "float"),
}


@pytest.mark.parametrize("build", BUILDS)
def test_the_same_bytes_without_data_on_any_number_of_threads(
    model: Path, data: Path, build: str
) -> None:
    out, file = locked(model, data, *BUILDS[build], "--search-time", 0)
    for threads in (1, 3):
        with threadpool_limits(threads):
            done = again(model, file, "--threads", threads)
        assert done.exit_code == 0, done.output
        assert model.with_name("again.onnx").read_bytes() == out.read_bytes()
        assert "the same bytes as locked, verified then on" in done.output
    has_ranges = build not in ("dynamic", "weight-only", "float")
    assert file.with_suffix(".npz").exists() == has_ranges


def test_what_a_search_lifted_is_locked(model: Path, data: Path) -> None:
    plain = ("--recipe", "per-tensor", "--target", "qdq", "--min-cosine", 0.995)
    out, file = locked(model, data, *plain)
    found = yaml.safe_load(file.read_text())
    assert [16 in pair for pair in found["recipe"]["precision"]].count(True) >= 1
    assert again(model, file).exit_code == 0
    assert model.with_name("again.onnx").read_bytes() == out.read_bytes()


def test_bits_of_weights_are_locked(model: Path, data: Path) -> None:
    few = ("--weight-bits", 4, "--embedding-bits", 6, "--weight-block", 0)
    out, file = locked(model, data, *few, "--min-cosine", 0.5, "--min-worst-cosine", 0.1)
    recipe = lockfile.read_lockfile(file).recipe
    assert (recipe.weight_bits, recipe.embedding_bits, recipe.weight_block) == (4, 6, 0)
    assert again(model, file).exit_code == 0
    assert model.with_name("again.onnx").read_bytes() == out.read_bytes()
    refused = again(model, file, "--weight-bits", 5)
    assert_one_line(refused, 2, "weight_bits is 5, but the lock says 4")


def test_a_lock_of_a_locked_build_says_the_same(model: Path, data: Path) -> None:
    _, file = locked(model, data)
    second = file.with_name("second.yaml")
    assert again(model, file, "--lock", second).exit_code == 0
    old, new = lockfile.read_lockfile(file), lockfile.read_lockfile(second)
    assert old.calibration is not None and new.calibration is not None
    assert old.calibration["sha256"] == new.calibration["sha256"]
    assert (old.output, old.model, old.verified) == (new.output, new.model, new.verified)
    assert old.decisions == new.decisions


def test_the_lock_is_readable_and_holds_every_decision_and_scale(model: Path, data: Path) -> None:
    out, file = locked(model, data)
    found = yaml.safe_load(file.read_text())
    report = json.loads(out.with_name("out.report.json").read_text())
    rows = [r for r in report["ledger"] if r["kind"] in ("weight", "activation")]
    decided = {(d["tensor"], d["as"], d["reason"]) for d in found["decisions"]}
    assert decided == {(r["tensor"], r["dtype"], r["reason"]) for r in rows}
    integers = [d for d in found["decisions"] if d["as"] != "float"]
    assert integers and all("scale" in d or "scales" in d for d in integers)
    assert found["environment"]["onnxruntime"] and found["data"]["feeds"] == 3
    assert found["model"]["bytes"] == model.stat().st_size
    lines = file.read_text().split("\ndecisions:\n")[1].splitlines()
    assert len(lines) == len(found["decisions"])  # a decision is a line


def test_data_that_is_given_all_the_same_serves_to_verify(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out, file = locked(model, data)
    done = again(model, file, "--data", data, "--no-bench")
    assert done.exit_code == 0 and "samples compared" in done.output
    assert "not what was locked" not in done.output
    other = save_tokens(tmp_path / "other.npz", seed=4)
    done = again(model, file, "--data", other, "--no-bench")
    assert done.exit_code == 0 and "the data is not what was locked" in done.output
    assert model.with_name("again.onnx").read_bytes() == out.read_bytes()


# ---- what changed is named


def test_another_model_is_named(model: Path, data: Path) -> None:
    _, file = locked(model, data)
    onnx.save(to_proto(encoder(2, width=16, outlier=41.0)), model)
    assert_one_line(again(model, file), 2, "'m.onnx' is not the one that was locked", "sha256")
    assert not model.with_name("again.onnx").exists()


def test_external_data_counts_as_the_model(model: Path, data: Path) -> None:
    proto = onnx.load(model)
    onnx.save_model(proto, model, save_as_external_data=True, location="w.bin", size_threshold=256)
    out, file = locked(model, data)
    assert again(model, file).exit_code == 0
    assert model.with_name("again.onnx").read_bytes() == out.read_bytes()
    values = bytearray(model.with_name("w.bin").read_bytes())
    values[100] ^= 1
    model.with_name("w.bin").write_bytes(bytes(values))
    assert_one_line(again(model, file), 2, "not the one that was locked")


def test_a_changed_missing_or_foreign_sidecar_is_named(model: Path, data: Path) -> None:
    _, file = locked(model, data)
    beside = file.with_suffix(".npz")
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_one_line(again(model, file), 2, "out.lock.npz", "sha256", "calibration changed")
    beside.unlink()
    assert_one_line(again(model, file), 2, "out.lock.npz", "No such file")


def edited(file: Path, old: str, new: str) -> None:
    text, count = re.subn(old, new, file.read_text(), count=1, flags=re.M)
    assert count == 1, old
    file.write_text(text)


def test_versions_are_a_note_where_the_bytes_are_the_same(model: Path, data: Path) -> None:
    """A version that builds the same bytes is harmless, so it is not an error by itself."""
    _, file = locked(model, data)
    edited(file, "  numpy: .*", "  numpy: 1.0.0")
    done = again(model, file)
    assert done.exit_code == 0 and "made in another environment: numpy 1.0.0 there" in done.output


def test_other_bytes_are_a_failure_that_names_the_version(model: Path, data: Path) -> None:
    out, file = locked(model, data)
    edited(file, "  onnxruntime: .*", "  onnxruntime: 1.0.0")
    edited(file, "^  sha256: " + lockfile.read_lockfile(file).output["sha256"], "  sha256: abc")
    assert_one_line(again(model, file), 1, "bytes differ", "onnxruntime 1.0.0 there")
    assert not model.with_name("again.onnx").exists()
    assert again(model, file, "--force").exit_code == 0
    assert model.with_name("again.onnx").read_bytes() == out.read_bytes()


def test_an_edited_recipe_is_named(model: Path, data: Path) -> None:
    _, file = locked(model, data)
    edited(file, "  keep_float: .*", "  keep_float: ['wh1']")
    assert_one_line(again(model, file), 1, "bytes differ", "recipe in the lock was edited")


def test_a_plan_that_the_calibration_does_not_cover_is_named(model: Path, data: Path) -> None:
    _, file = locked(model, data, "--keep-float", "wh1")
    edited(file, "  keep_float:\n  - wh1", "  keep_float: []")
    assert_one_line(again(model, file), 2, "does not fit the plan", "edited")


def test_options_cannot_change_a_locked_build(model: Path, data: Path) -> None:
    _, file = locked(model, data)
    result = again(model, file, "--target", "qdq")
    assert_one_line(result, 2, "target is 'qdq'", "lock says 'cpu'")
    assert again(model, file, "--target", "cpu").exit_code == 0
    with pytest.raises(RecipeError, match="seed is 3, but the lock says 0"):
        qcompile.compile(model, recipe=file, seed=3)


BROKEN = [
    (lambda t: t.replace("version: 1\n", "version: 7\n", 1), "has version 7, expected 1"),
    (lambda t: t.replace("pipeline:", "pipelin:", 1), "did you mean 'pipeline'"),
    (lambda t: t.replace("mode: static", "mode: statc", 1), "did you mean 'static'"),
    (
        lambda t: t.replace("file: out.lock.npz", "file: ../x.npz"),
        "not in the lock's folder",
    ),
    (lambda t: t.replace("file: out.lock.npz", "file: 3"), "calibration has no file"),
    (lambda t: t.replace("decisions:\n", "decisions: 3\nx:\n"), "unknown key 'x'"),
    (lambda t: t.split("decisions:")[0], "decisions is None, expected a list"),
    (lambda t: t.replace("  target: cpu", "  targte: cpu"), "did you mean 'target'"),
    (lambda t: t.replace("precision: []", "precision: [3]"), "expected pairs"),
    (lambda t: t.replace("precision: []", "precision: [[a, 9]]"), "expected 2 to 8, 16 or float"),
    (lambda t: t + "\n\t- [", "is not YAML"),
]


@pytest.mark.parametrize(("change", "said"), BROKEN)
def test_broken_locks_are_one_error(
    model: Path, data: Path, change: Callable[[str], str], said: str
) -> None:
    _, file = locked(model, data)
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))
    assert_one_line(again(model, file), 2, "out.lock.yaml", said)


def test_wrong_files_for_a_lock(model: Path, data: Path) -> None:
    given = ("compile", model, "-o", model.with_name("o.onnx"), "--data", data, "--lock")
    assert_one_line(run(*given, model.with_name("o.json")), 2, "expected a .yaml file")
    assert_one_line(run(*given, model.parent / "no" / "o.yaml"), 2, "does not exist")
    assert_one_line(run(*given, data.with_suffix(".yaml"), "--report", data), 2, ".json")


# ---- from Python


def test_from_python(model: Path, data: Path, tmp_path: Path) -> None:
    made = qcompile.compile(model, str(data), options=QUICK)
    made.save_lock(tmp_path / "p.yaml")
    same = qcompile.compile(model.read_bytes(), recipe=tmp_path / "p.yaml")
    assert same.model == made.model and same.report.verdict is None
    with pytest.raises(OutputError, match="keep_calibration"):
        same.save_lock(tmp_path / "q.yaml")


def test_a_lock_is_a_recipe_for_sensitivity(model: Path, data: Path) -> None:
    _, file = locked(model, data, "--recipe", "per-tensor")
    done = run("sensitivity", model, "--data", data, "--recipe", file, "--json")
    assert json.loads(done.stdout)["recipe"]["transforms"] == "none"


def test_precision_with_a_pattern_twice_survives(tmp_path: Path, model: Path, data: Path) -> None:
    made = qcompile.compile(model, str(data), options=QUICK).lock
    assert made is not None
    pairs = (("x0", 16), ("*", 8), ("x0", 8))
    odd = replace(made, recipe=Recipe(precision=pairs))  # type: ignore[arg-type]
    lockfile.save_lock(tmp_path / "odd.yaml", odd, None)
    assert lockfile.read_lockfile(tmp_path / "odd.yaml").recipe.precision == pairs
