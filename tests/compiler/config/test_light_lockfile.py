"""Light locks: the same bytes from the same data; other data, and none, are one line each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import yaml
from click.testing import Result

import qcompile
from qcompile import Options
from qcompile.compiler.config import lockfile
from qcompile.compiler.model_folder.layout import MANIFEST
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.errors import OutputError, RecipeError
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.rewriting.testing import encoder
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.written_folder import decoder, write_folder, write_text
from tests.encoder_files import save_tokens, token_feeds

LIGHT = Options(bench=False, threads=1, keep_lock=True)


def made_with(model: Path, data: object, **settings: object) -> tuple[bytes, Path]:
    """The bytes of a build, and its light lock."""
    result = qcompile.compile(model, data, options=LIGHT, **settings)  # type: ignore[arg-type]
    file = model.with_name("m.lock.yaml")
    result.save_lock(file, light=True)
    assert not file.with_suffix(".npz").exists()
    return result.model, file


def again(model: Path, file: Path, *more: object) -> Result:
    out = model.with_name("again.onnx")
    return run("compile", model, "-o", out, "--recipe", file, "--no-bench", *more)


BUILDS: dict[str, dict[str, object]] = {
    "cpu": {},
    "qdq": {"target": "qdq"},
    "percentile": {"calibrator": "percentile{percentile=99.9}", "seed": 5},
}


@pytest.mark.parametrize("build", BUILDS)
def test_the_same_data_give_the_same_bytes(model: Path, data: Path, build: str) -> None:
    first, file = made_with(model, str(data), **BUILDS[build])
    for threads in (1, 3):
        done = again(model, file, "--data", data, "--threads", threads, "--no-cache")
        assert done.exit_code == 0, done.output
        assert model.with_name("again.onnx").read_bytes() == first
        assert "the same bytes as locked" in done.output
        assert "samples compared" in done.output  # with data it is verified too


def test_what_a_search_lifted_is_built_again(model: Path, data: Path) -> None:
    out, gates = model.with_name("out.onnx"), ("--min-cosine", 0.995)
    plain = ("--recipe", "per-tensor", "--target", "qdq", *gates, "--no-bench")
    full = model.with_name("full.yaml")
    assert run("compile", model, "-o", out, "--data", data, "--lock", full, *plain).exit_code == 0
    found = lockfile.read_lockfile(full)
    assert 16 in [bits for _, bits in found.recipe.precision]
    file = model.with_name("m.lock.yaml")
    rebuilt = qcompile.compile(model, recipe=full, options=LIGHT)
    rebuilt.save_lock(file, light=True)
    done = again(model, file, "--data", data)
    assert done.exit_code == 0, done.output
    assert model.with_name("again.onnx").read_bytes() == out.read_bytes()


def test_it_says_what_was_not_kept_and_what_to_do(model: Path, data: Path) -> None:
    _, file = made_with(model, str(data))
    found = yaml.safe_load(file.read_text())
    assert "--lock FILE" in found["calibration"]["not_kept"]
    assert (found["calibration"]["calibrator"], found["calibration"]["feeds"]) == ("minmax", 3)
    assert file.read_text().splitlines()[0].endswith("--data DATA --recipe THIS.yaml -o OUT")
    assert found["data"] == {
        "sha256": found["data"]["sha256"], "general_text": None, "feeds": 3, "held_back": 1,
        "samples": None, "batch_size": None, "max_length": None,
        "text_columns": None,
    }  # fmt: skip


def test_modes_without_ranges_need_no_data(model: Path, data: Path) -> None:
    first, file = made_with(model, str(data), mode="dynamic")
    assert lockfile.read_lockfile(file).calibration is None
    assert again(model, file).exit_code == 0
    assert model.with_name("again.onnx").read_bytes() == first


# ---- refusals


def test_without_data_is_one_line(model: Path, data: Path) -> None:
    _, file = made_with(model, str(data))
    digest = lockfile.read_lockfile(file).data["sha256"][:12]  # type: ignore[index]
    refused = again(model, file)
    assert_one_line(refused, 2, "holds no calibration", f"sha256 {digest}…", "compile --lock")
    assert not model.with_name("again.onnx").exists()


def test_other_data_is_one_line_with_both_digests(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = made_with(model, str(data))
    expected = lockfile.read_lockfile(file).data["sha256"][:12]  # type: ignore[index]
    other = save_tokens(tmp_path / "other.npz", 4)
    monkeypatch.setattr("qcompile.calibration.collector.collect", None)  # before any work
    for cache in ((), ("--no-cache",)):
        done = again(model, file, "--data", other, *cache)
        assert_one_line(done, 2, "data is not what was locked", f"expected {expected}…")
        assert "no --samples, no --batch-size" in done.stderr
    assert not model.with_name("again.onnx").exists()


@pytest.mark.parametrize("option", ["samples", "batch_size"])
def test_options_that_choose_samples_count_as_the_data(
    model: Path, data: Path, option: str
) -> None:
    options = Options(bench=False, threads=1, keep_lock=True, **{option: 4})  # type: ignore[arg-type]
    result = qcompile.compile(model, str(data), options=options)
    result.save_lock(file := model.with_name("m.lock.yaml"), light=True)
    flag = f"--{option.replace('_', '-')}"
    assert_one_line(again(model, file, "--data", data), 2, "not what was locked", f"{flag} 4")
    assert again(model, file, "--data", data, flag, 4).exit_code == 0
    assert model.with_name("again.onnx").read_bytes() == result.model


def test_data_that_can_be_read_once_is_checked_too(model: Path, data: Path) -> None:
    def halves(seed: int) -> Iterator[Feed]:
        whole = token_feeds(1, 32, seed=seed)[0]
        return ({k: v[i : i + 8] for k, v in whole.items()} for i in range(0, 32, 8))

    first, file = made_with(model, halves(3))
    same = qcompile.compile(model, halves(3), recipe=file, options=LIGHT)
    assert same.model == first
    assert qcompile.compile(model, str(data), recipe=file, options=LIGHT).model == first
    with pytest.raises(RecipeError, match="the data is not what was locked"):
        qcompile.compile(model, halves(4), recipe=file, options=LIGHT)


def test_another_model_and_other_options_are_named(model: Path, data: Path) -> None:
    _, file = made_with(model, str(data))
    assert_one_line(again(model, file, "--data", data, "--seed", 3), 2, "seed is 3", "says 0")
    onnx.save(to_proto(encoder(2, width=16, outlier=41.0)), model)
    assert_one_line(again(model, file, "--data", data), 2, "is not the one that was locked")


def test_other_bytes_are_a_failure(model: Path, data: Path) -> None:
    first, file = made_with(model, str(data))
    text = file.read_text()
    file.write_text(text.replace(lockfile.read_lockfile(file).output["sha256"], "abc"))
    done = again(model, file, "--data", data)
    assert_one_line(done, 1, "bytes differ", "expected abc", "calibration ran again", "--threads")
    assert not model.with_name("again.onnx").exists()
    assert again(model, file, "--data", data, "--force").exit_code == 0
    assert model.with_name("again.onnx").read_bytes() == first


def test_a_light_lock_without_the_digest_of_its_data_is_refused(model: Path, data: Path) -> None:
    _, file = made_with(model, str(data))
    whole = file.read_text()
    for old, new in ((r"^data:\n  sha256: .*", "data:"), (r"^data:\n(  .*\n)+", "data: null\n")):
        text, count = re.subn(old, new, whole, count=1, flags=re.M)
        assert count == 1
        file.write_text(text)
        assert_one_line(again(model, file, "--data", data), 2, "data has no sha256")


def test_a_full_lock_of_what_was_not_kept_is_refused(model: Path, data: Path) -> None:
    result = qcompile.compile(model, str(data), options=LIGHT)
    with pytest.raises(OutputError, match="no calibration was kept for the lock: compile with"):
        result.save_lock(model.with_name("l.yaml"))
    assert not model.with_name("l.yaml").exists()


# ---- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "in")


def compiled(folder: Path, out: str, *more: object) -> Path:
    target = folder.with_name(out)
    done = run("compile", folder, "-o", target, "--no-bench", *more)
    assert done.exit_code == 0, done.output
    return target


def test_a_folder_builds_itself_again(folder: Path, tmp_path: Path) -> None:
    """Text is data whose batches and tokens follow from folder and options; all of it counts."""
    text = write_text(tmp_path / "text.txt")
    one = compiled(folder, "one", "--data", text, "--samples", 40, "--batch-size", 4)
    manifest = json.loads((one / MANIFEST).read_text())
    assert "model.lock.yaml" in manifest["files"]
    own = ("--recipe", one / "model.lock.yaml", "--data", text)
    refused = run("compile", folder, "-o", folder.with_name("two"), "--no-bench", *own)
    assert_one_line(refused, 2, "not what was locked", "--samples 40, --batch-size 4")
    two = compiled(folder, "two", *own, "--samples", 40, "--batch-size", 4)
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for name in ("model.onnx", "model.lock.yaml"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    compiled(folder, "one", "--data", text)  # and OUT is replaced, since all in it is listed
    found = json.loads(run("diff", one / "model.onnx", two / "model.onnx", "--json").stdout)
    assert found["a"]["lock"] and found["b"]["lock"]
    old, new = (found["settings"]["data sha256"][side] for side in "ab")
    assert old != new and len(new) == 64


def test_general_text_beside_the_data_counts(folder: Path, tmp_path: Path) -> None:
    """The same tokens without it are other statistics of channels."""
    text = write_text(tmp_path / "text.txt")
    options = Options(tokenizer=folder, bench=False, keep_lock=True)
    made = qcompile.compile(folder / "model.onnx", str(text), options=options)
    made.save_lock(file := tmp_path / "m.lock.yaml", light=True)
    assert lockfile.read_lockfile(file).data["general_text"] is not None  # type: ignore[index]
    specs = input_specs(read_model.load(folder / "model.onnx"))
    feeds = list(open_data(text, specs, tokenizer=folder))
    with pytest.raises(
        RecipeError, match=r"general text that is run with the data .* sha256 of none"
    ):
        qcompile.compile(folder / "model.onnx", feeds, recipe=file, options=options)


def test_a_full_lock_beside_gives_the_light_one_its_data(folder: Path, tmp_path: Path) -> None:
    """Built without data from a full lock, OUT still holds a lock that data can use."""
    text, full = write_text(tmp_path / "text.txt"), tmp_path / "full.yaml"
    one = compiled(folder, "one", "--data", text, "--lock", full)
    assert full.with_suffix(".npz").exists() and not (one / "model.lock.npz").exists()
    two = compiled(folder, "two", "--recipe", full)
    assert (
        lockfile.read_lockfile(one / "model.lock.yaml").data
        == lockfile.read_lockfile(two / "model.lock.yaml").data
    )
    three = compiled(folder, "three", "--recipe", two / "model.lock.yaml", "--data", text)
    assert (one / "model.onnx").read_bytes() == (three / "model.onnx").read_bytes()


def test_each_of_several_models_has_its_lock(folder: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    onnx.save(decoder(), folder / "decoder_model.onnx")
    out = compiled(folder, "one", "--data", text)
    kept = {p.name: lockfile.read_lockfile(p).is_light for p in out.glob("*.lock.yaml")}
    assert kept == {"model.lock.yaml": True, "decoder_model.lock.yaml": False}
    again = compiled(out, "two", "--mode", "float")  # what describes the first is not copied
    passed_over = json.loads((again / MANIFEST).read_text())["passed_over"]
    assert "written again" in passed_over["model.lock.yaml"]
