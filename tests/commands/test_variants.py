"""``compile FOLDER --variant``, models of the hub by name, and the model card, from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import Result

import qcompile
from qcompile.compiler.model_folder import hub
from qcompile.compiler.model_folder.layout import MANIFEST
from qcompile.compiler.report.model_card import front_matter
from qcompile.compiler.stages import calibrate
from qcompile.errors import ModelError
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.hub_cache import REVISION, put_into_cache
from tests.compiler.model_folder.written_folder import encoder, write_folder, write_text

CARD = "---\nlicense: mit\n---\n# Float\nThe float model's text.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = write_folder(tmp_path / "in")
    (root / "README.md").write_text(CARD)
    return root


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def compiled(model: object, out: Path, *more: object) -> Result:
    return run("compile", model, "-o", out, "--no-bench", *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_several_variants_in_one_run(folder: Path, text: Path) -> None:
    out = folder.with_name("out")
    result = compiled(folder, out, "--data", text, "--variants", "int8,q4", "--variant", "fp16")
    assert result.exit_code == 0, result.output
    models = {str(p.relative_to(out)) for p in out.rglob("*.onnx")}
    assert models == {f"onnx/model_{n}.onnx" for n in ("quantized", "q4", "fp16")}
    found = json.loads((out / MANIFEST).read_text())
    assert {name: v["variant"] for name, v in found["variants"].items()} == {
        "onnx/model_quantized.onnx": "int8",
        "onnx/model_q4.onnx": "q4",
        "onnx/model_fp16.onnx": "fp16",
    }
    for name in models:
        onnx.checker.check_model(str(out / name))
        assert (out / name).with_suffix(".report.json").is_file()
    card = (out / "README.md").read_text()
    assert front_matter(card)["license"] == "mit" and "The float model's text" not in card
    assert all(f"`{name}`" in card for name in models)


def test_in_place_nothing_else_is_touched(folder: Path, text: Path) -> None:
    before = contents(folder)
    assert compiled(folder, folder, "--data", text, "--variant", "int8").exit_code == 0
    first = contents(folder)
    assert {name: first[name] for name in before} == before
    assert set(first) - set(before) == {
        MANIFEST, *(f"onnx/model_quantized{s}" for s in (".onnx", ".report.json", ".lock.yaml")),
    }  # fmt: skip
    result = compiled(f"{folder}/", folder, "--data", text, "--variant", "q4")
    assert result.exit_code == 0, result.output
    second = contents(folder)
    assert {n: second[n] for n in first if n != MANIFEST} == {
        n: first[n] for n in first if n != MANIFEST
    }
    assert len(json.loads(second[MANIFEST])["variants"]) == 2
    same = compiled(folder, folder, "--data", text, "--variant", "int8")
    assert same.exit_code == 0, same.output
    assert (folder / "onnx/model_quantized.onnx").read_bytes() == first["onnx/model_quantized.onnx"]


def test_in_place_others_files_and_failures(folder: Path, text: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model_q4.onnx").write_bytes(b"of somebody else")
    before = contents(folder)
    refused = compiled(folder, folder, "--data", text, "--variant", "q4")
    assert_one_line(refused, 2, "'onnx/model_q4.onnx', which qcompile did not write")
    gate = ("--data", text, "--variants", "int8,fp16", "--min-cosine", "0.9999999")
    assert_one_line(
        compiled(folder, folder, *gate, "--search-time", 0), 1, "onnx/model_quantized.onnx: "
    )
    assert_one_line(compiled(folder, folder, "--data", text), 2, "only --variant adds files to it")
    assert contents(folder) == before


def test_a_lock_builds_its_variant_again(folder: Path, text: Path) -> None:
    out = folder.with_name("out")
    assert compiled(folder, out, "--data", text, "--variant", "int8_avx512_vnni").exit_code == 0
    name = "onnx/model_qint8_avx512_vnni"
    lock = (out / f"{name}.lock.yaml").rename(folder.with_name("lock.yaml"))
    first = (out / f"{name}.onnx").read_bytes()
    locked = ("--data", text, "--recipe", lock, "--variant")
    assert compiled(folder, out, *locked, "int8_avx512_vnni").exit_code == 0
    assert (out / f"{name}.onnx").read_bytes() == first
    assert_one_line(compiled(folder, out, *locked, "int8_avx2"), 2, "isa 'avx2', but 'avx512-vnni'")
    assert_one_line(compiled(folder, out, *locked, "fp16"), 2, "lock is not that of variant 'fp16'")


def test_options_for_folders(folder: Path, text: Path) -> None:
    out = folder.with_name("out")
    for option, value in (("--variant", "q4"), ("--push", "a/b"), ("--base-model", "a/b")):
        result = compiled(folder / "model.onnx", out, option, value)
        assert_one_line(result, 2, f"{option} is for a model folder")
    assert_one_line(compiled(folder, out, "--variant", "q5"), 2, "unknown variant 'q5'")
    assert_one_line(compiled(folder, out, "--revision", "main"), 2, "no revision 'main'")
    report = ("--report", folder.with_name("r.html"))
    both = compiled(folder, out, "--data", text, "--variants", "int8,q4", *report)
    assert_one_line(both, 2, "--report is for one model, but several files are written")
    assert not out.exists()


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """some/model in the hub's cache, with weights outside its ONNX file; no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    onnx.save(
        encoder(), folder / "model.onnx", save_as_external_data=True,
        location="model.onnx_data", size_threshold=1024,
    )  # fmt: skip
    return put_into_cache(tmp_path / "cache", list(folder.iterdir()), folder)


@pytest.mark.parametrize("by", ["name", "path"])
def test_a_model_of_the_hub_by_its_name_and_its_snapshot(
    cached: Path, tmp_path: Path, text: Path, by: str
) -> None:
    out = tmp_path / "out"
    result = compiled("some/model" if by == "name" else cached, out, "--data", text)
    assert result.exit_code == 0, result.output
    assert front_matter((out / "README.md").read_text())["base_model"] == "some/model"
    assert json.loads((out / MANIFEST).read_text())["source"] == "some/model"
    assert (out / "config.json").is_file() and not any(p.is_symlink() for p in out.rglob("*"))
    refused = compiled(cached, cached, "--data", text, "--variant", "q4")
    assert_one_line(refused, 2, "in the cache of the Hugging Face hub")


@pytest.mark.usefixtures("cached")
def test_what_the_hub_does_not_have(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(
        compiled("some/other", out), 2, "'some/other' is neither a file nor a folder here"
    )
    other = compiled("some/model", out, "--revision", "0" * 40)
    assert_one_line(other, 2, "cannot be downloaded")
    assert_one_line(compiled(tmp_path / "gone.onnx", out), 2, "gone.onnx")


def test_only_float_models_are_downloaded(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, str | None, list[str]]] = []

    def download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert "*.json" in allow_patterns
        calls.append((name, revision, ignore_patterns))
        return str(cached)

    monkeypatch.setattr(library, "snapshot_download", download)
    assert hub.find_source("some/model", "v1").folder.models == ("model.onnx",)
    ((name, revision, ignored),) = calls
    assert (name, revision) == ("some/model", "v1") and "*_fp16.onnx*" in ignored
    (cached / "model.onnx").unlink()
    hub.find_source("some/model")
    assert len(calls) == 3  # without ONNX files the weights of torch are fetched
    with pytest.raises(ModelError, match="neither a folder nor"):
        hub.find_source("a b")
    assert REVISION in str(cached)


def test_upload(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[str, Path, list[str], str]] = []

    def push(repository: str, folder: Path, names: list[str], message: str) -> str:
        pushed.append((repository, folder, names, message))
        return "https://hub/commit/1"

    monkeypatch.setattr(hub, "check_push", lambda _: None)
    monkeypatch.setattr(hub, "push", push)
    more = ("--data", text, "--variant", "q4", "--push", "me/small")
    result = compiled(folder, folder, *more)
    assert "uploaded: https://hub/commit/1" in result.stdout, result.output
    ((repository, out, names, _),) = pushed
    assert (repository, out) == ("me/small", folder)
    assert sorted(names) == [
        *(f"onnx/model_q4.{s}" for s in ("lock.yaml", "onnx", "report.json")), MANIFEST,
    ]  # fmt: skip
    found = json.loads(compiled(folder, folder.with_name("out"), *more, "--json").stdout)
    assert found["uploaded"] == "https://hub/commit/1" and "README.md" in pushed[1][2]


def test_from_python(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both need the same ranges, so that the data runs once."""
    runs, run_data = [], calibrate._run

    def counted(*args: Any) -> Any:
        runs.append(args)
        return run_data(*args)

    monkeypatch.setattr(calibrate, "_run", counted)
    out = folder.with_name("out")
    made = qcompile.compile_folder(
        folder, out, str(text), variants=["int8", "int8_avx512_vnni"], base_model="org/float",
        options=qcompile.Options(bench=False),
    )  # fmt: skip
    assert list(made.files) == ["onnx/model_quantized.onnx", "onnx/model_qint8_avx512_vnni.onnx"]
    second = made.files["onnx/model_qint8_avx512_vnni.onnx"]
    assert second.recipe.isa == "avx512-vnni" and second.int8_linears == 2
    assert front_matter((out / "README.md").read_text())["base_model"] == "org/float"
    assert len(runs) == 1
    assert [n.code for n in second.notes if "calibration" in n.code] == []
