"""``qcompile train FOLDER``: learns, writes a compiled folder, or one line on why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import Result

import qcompile
from qcompile import TrainingOptions
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.labelled_folder import write_classifier, write_labelled
from tests.compiler.model_folder.written_folder import write_text

pytest.importorskip("torch")

QUICK = ("--target", "qdq", "--no-bench", "--no-cache", "--threads", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "in")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "train.jsonl")


@pytest.fixture
def held_back(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "dev.jsonl", 32, seed=1)


def train(folder: Path, texts: Path, *more: object) -> Result:
    out = folder.with_name("out")
    return run("train", folder, "-o", out, "--data", texts, *QUICK, *more)


def report(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        (folder.with_name("out") / "model.report.json").read_text()
    )
    return found


def test_labels_are_learned(folder: Path, texts: Path, held_back: Path) -> None:
    page = folder.with_name("page.html")
    given = ("--eval", held_back, "--epochs", 8, "--learning-rate", 1e-2, "--batch-size", 16)
    result = train(folder, texts, *given, "--report", page)
    assert result.exit_code == 0, result.output
    found = report(folder)["training"]
    assert isinstance(found, dict)
    metric = found["metric"]
    assert metric["name"] == "accuracy" and metric["samples"] == 32
    assert metric["compiled"] > metric["calibrated"] and metric["compiled"] == metric["trained"]
    assert found["curve"][0]["step"] == 0 and found["steps"] == 32 and found["batch_size"] == 16
    assert found["agreement"]["argmax_equal"] == found["agreement"]["decisions"] == 32
    assert found["float_agreement"]["rms"] <= 1e-6
    assert "accuracy, trained" in result.stdout and 'id="training"' in page.read_text()
    names = sorted(p.name for p in folder.with_name("out").iterdir())
    assert names == [
        "README.md", "config.json", "model.lock.yaml", "model.onnx", "model.report.json",
        "qcompile.json", "tokenizer.json",
    ]  # fmt: skip
    assert not list(folder.parent.glob("*.training.pt"))  # nothing to resume from is left


def test_the_lock_of_a_trained_model_says_what_repeats_it(
    folder: Path, texts: Path, held_back: Path
) -> None:
    assert train(folder, texts, "--eval", held_back, "--steps", 1).exit_code == 0
    lock = folder.with_name("out") / "model.lock.yaml"
    assert "qcompile train" in lock.read_text().splitlines()[0]
    again = run("compile", folder / "model.onnx", "-o", folder.with_name("x.onnx"), "--recipe",
                lock, "--data", texts, "--tokenizer", folder)  # fmt: skip
    assert_one_line(again, 2, "lock is that of a trained model", "qcompile train")
    assert_one_line(train(folder, texts, "--eval", held_back, "--recipe", lock), 2, "lock")


def test_the_gate_on_the_metric(folder: Path, texts: Path, held_back: Path) -> None:
    given = ("--eval", held_back, "--steps", 1, "--learning-rate", 1e-6)
    impossible = (*given, "--max-drop", -50)
    assert_one_line(train(folder, texts, *impossible), 1, "accuracy is", "--max-drop -50")
    assert not folder.with_name("out").exists()
    assert folder.with_name("out.training.pt").is_file()  # the work is not lost
    forced = train(folder, texts, *impossible, "--force")
    assert forced.exit_code == 0 and "continued from a checkpoint after step 1" in forced.output


def test_distillation_needs_no_labels(folder: Path, tmp_path: Path) -> None:
    result = train(folder, write_text(tmp_path / "t.txt"), "--distill", "--steps", 3, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["files"]["model.onnx"]
    assert found["training"]["distilled"] and found["training"]["metric"]["name"] == "cosine"
    assert found["gates"]["min_cosine"] == 0.98  # as in compile: closeness is the goal


def test_closeness_is_no_gate_where_labels_teach(
    folder: Path, texts: Path, held_back: Path
) -> None:
    given = ("--eval", held_back, "--steps", 1, "--json")
    gates = json.loads(train(folder, texts, *given).stdout)["files"]["model.onnx"]["gates"]
    assert gates["min_cosine"] is None and gates["max_size_ratio"] == 1
    asked = train(folder, texts, *given, "--min-cosine", 0.5, "--force")
    assert json.loads(asked.stdout)["files"]["model.onnx"]["gates"]["min_cosine"] == 0.5


def test_an_onnx_file_with_the_folder_of_its_tokenizer(
    folder: Path, texts: Path, held_back: Path
) -> None:
    out = folder.with_name("out.onnx")
    result = run("train", folder / "model.onnx", "-o", out, "--data", texts, *QUICK,
                 "--tokenizer", folder, "--eval", held_back, "--steps", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(out.with_suffix(".report.json").read_text())["training"]["steps"] == 1


def test_in_python(folder: Path, texts: Path, held_back: Path) -> None:
    options = qcompile.Options(bench=False, threads=1)
    result = qcompile.train(
        folder, TrainingOptions(texts, held_back, steps=1), target="qdq", options=options
    )
    assert result.report.training is not None and result.report.training.metric is not None
    assert result.report.gates.min_cosine is None and result.model


def test_bad_use(folder: Path, texts: Path, held_back: Path, tmp_path: Path) -> None:
    graded = ("--eval", held_back)
    assert_one_line(train(folder, texts), 2, "--eval", "--distill")
    assert_one_line(
        train(folder, texts, *graded, "--target", "cpu", "--mode", "dynamic"),
        2,
        "mode dynamic takes",
    )
    assert_one_line(train(folder, texts, *graded, "--mode", "float"), 2, "mode float")
    plain = write_text(tmp_path / "plain.txt")
    assert_one_line(train(folder, plain, *graded), 2, "plain.txt, line 1", "label")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"text": "a b", "label": "none of them"}\n')
    assert_one_line(train(folder, foreign, *graded), 2, "foreign.jsonl, line 1", "none of them")
    assert_one_line(train(folder, texts, "--eval", foreign), 2, "foreign.jsonl, line 1")
    (folder / "second.onnx").write_bytes((folder / "model.onnx").read_bytes())
    assert_one_line(train(folder, texts, *graded), 2, "one model", "second.onnx")
    assert not folder.with_name("out").exists()


def test_without_torch(
    folder: Path, texts: Path, held_back: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.compiler.training.training_checks.find_spec", lambda _name: None)
    result = train(folder, texts, "--eval", held_back)
    assert_one_line(result, 2, "training needs torch: pip install")


def test_searches_exclude_training(folder: Path, texts: Path) -> None:
    training = TrainingOptions(texts, distill=True)
    for options, what in (
        (qcompile.Options(tune=True), "--tune"),
        (qcompile.Options(search_time=1.0), "search"),
    ):
        with pytest.raises(qcompile.QCompileError, match=what):
            qcompile.train(folder, training, target="qdq", options=options)


def test_without_training_torch_is_not_imported() -> None:
    import subprocess

    code = "import sys, qcompile, qcompile.commands.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
