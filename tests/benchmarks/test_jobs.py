"""benchmarks/jobs: measures, damage that is noticed, and commands as docs/jobs.md shows them.

The jobs themselves need packages that tests do not have. Here a job without them is run: its
"package" is ONNX Runtime, and its compiled model a copy of the float one.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.jobs import __main__ as jobs
from benchmarks.jobs import _job, _text_models
from benchmarks.jobs._job import Job, JobError
from benchmarks.jobs._measures import (
    Box,
    neighbour_order,
    ranking_order,
    same_boxes,
    same_labels,
    spearman,
)
from qcompile.runtime.session import Session

PAGE = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
SECTIONS = ("Embed", "Classify", "Rerank", "Detect", "Serve")
SAYS_YES = shlex.join([sys.executable, "-c", ""])
SAYS_NO = shlex.join([sys.executable, "-c", "import sys; sys.exit('worst cosine .1')"])


def write_models(work: Path) -> None:
    """float.onnx [n, 16] → [n, 16], and the same as compiled.onnx."""
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), work / "float.onnx")
    shutil.copyfile(work / "float.onnx", work / "compiled.onnx")


def answer(work: Path, file: Path) -> list[str]:
    """Labels of 64 inputs."""
    x = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    (y,) = Session(file).run({"x": x}).values()
    return [str(label) for label in y.argmax(1)]


JOB = Job(
    name="classify/one-layer",
    package="onnxruntime",
    needs=("onnxruntime",),
    make=write_models,
    build=(),
    answer=answer,
    compare=same_labels,
    measure="same label",
    least=0.9,
    float_name="float.onnx",
    compiled_name="compiled.onnx",
)


def test_five_jobs_by_three_architectures() -> None:
    names = [job.name for job in jobs.ALL]
    assert len(set(names)) == len(names) == 15
    kinds = Counter(name.split("/")[0] for name in names)
    assert kinds == {section.lower(): 3 for section in SECTIONS}


def test_a_job_passes(tmp_path: Path) -> None:
    outcome = _job.run(replace(JOB, gate=SAYS_YES), tmp_path)
    assert outcome.faults == ()
    assert outcome.score == 1
    assert outcome.size == outcome.float_size == (tmp_path / "float.onnx").stat().st_size
    assert jobs.line(outcome).endswith("| passed |")
    assert not jobs.failed(outcome)


def test_damage_is_noticed(tmp_path: Path) -> None:
    outcome = _job.run(JOB, tmp_path, damaged=True)
    onnx.checker.check_model(tmp_path / "compiled.onnx")  # a valid file, with other answers
    assert outcome.score is not None
    assert outcome.score < 0.5
    assert jobs.failed(outcome)
    assert not jobs.failed(outcome, damaged=True)
    assert "is below 0.9" in jobs.line(outcome)


def test_damage_shows_in_a_model_that_is_the_same_backwards(tmp_path: Path) -> None:
    """As two layers may be together where each is reversed."""
    write_models(tmp_path)
    path = tmp_path / "compiled.onnx"
    model = onnx.load(path)
    (tensor,) = model.graph.initializer
    weight = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(weight + weight[::-1, ::-1], "w"))
    onnx.save(model, path)
    before = answer(tmp_path, path)
    _job.damage(path)
    assert same_labels(before, answer(tmp_path, path)) < 0.5


def test_a_comparison_that_does_not_notice_damage_fails(tmp_path: Path) -> None:
    blind = replace(JOB, compare=lambda expected, found: 1.0)
    outcome = _job.run(blind, tmp_path, damaged=True)
    assert jobs.failed(outcome, damaged=True)
    assert "not noticed" in jobs.line(outcome, damaged=True)


@pytest.mark.parametrize(("gate", "blind"), [(SAYS_YES, True), (SAYS_NO, False)])
def test_the_gate_must_notice_damage_too(tmp_path: Path, gate: str, blind: bool) -> None:
    outcome = _job.run(replace(JOB, gate=gate), tmp_path, damaged=True)
    assert jobs.failed(outcome, damaged=True) == blind


def test_a_gate_that_fails_fails_the_job(tmp_path: Path) -> None:
    outcome = _job.run(replace(JOB, gate=SAYS_NO), tmp_path)
    assert outcome.score == 1
    (fault,) = outcome.faults
    assert "exit code 1: worst cosine .1" in fault


def test_a_command_that_fails_ends_the_job(tmp_path: Path) -> None:
    outcome = _job.run(replace(JOB, build=(SAYS_NO,)), tmp_path)
    assert outcome.score is None
    assert jobs.failed(outcome)
    assert jobs.failed(outcome, damaged=True)  # no answer was compared


def test_a_missing_package_is_a_reason() -> None:
    outcome = _job.run(replace(JOB, needs=("qcompile-no-such-package",)), Path())
    assert outcome.missing.startswith("qcompile-no-such-package is not installed: pip install")
    assert jobs.line(outcome).endswith(f"| not run: {outcome.missing} |")
    assert not jobs.failed(outcome)
    assert not jobs.failed(outcome, damaged=True)


def test_a_missing_npm_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/node")
    with pytest.raises(JobError, match="no-such is not installed: npm install"):
        _job.versions_of(replace(JOB, npm=("no-such",)))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(JobError, match="Node is not installed"):
        _job.versions_of(replace(JOB, npm=("no-such",)))


def test_a_slow_job_fails(tmp_path: Path) -> None:
    assert "at most -1 are allowed" in _job.run(JOB, tmp_path, most_seconds=-1).faults[0]


def test_what_a_package_prints_is_not_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    def loud(work: Path) -> None:
        print("downloading nothing")
        write_models(work)

    jobs.table([replace(JOB, make=loud)], damaged=False)
    printed = capsys.readouterr()
    assert "downloading" not in printed.out
    assert "downloading" in printed.err


def test_a_table_fails_by_its_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.table([JOB], damaged=False) == 0
    assert jobs.table([replace(JOB, least=2.0), JOB], damaged=False) == 1
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert {row.count("|") for row in rows} == {jobs.COLUMNS.count("|")}


def test_jobs_by_pattern() -> None:
    assert [job.name for job in jobs.chosen("*/yolos")] == ["detect/yolos"]
    with pytest.raises(SystemExit):
        jobs.chosen("sing/*")


def test_measures_of_equal_answers_are_one() -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 4))
    assert neighbour_order(vectors, 3 * vectors) == pytest.approx(1)
    assert ranking_order(vectors, vectors + 1) == pytest.approx(1)
    assert same_labels(["a", "b"], ["a", "b"]) == 1
    boxes = [[Box("a", (0, 0, 10, 10))], []]
    assert same_boxes(boxes, boxes) == 1


def test_measures_of_other_answers() -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 4))
    assert neighbour_order(vectors, vectors[::-1] ** 3) < 0.5
    assert ranking_order([[1, 2, 3]], [[3, 2, 1]]) == pytest.approx(-1)
    assert same_labels(["a", "b"], ["a", "a"]) == 0.5
    with pytest.raises(ValueError, match="1 labels, expected 2"):
        same_labels(["a", "b"], ["a"])


def test_ranks_of_equal_values_are_their_mean() -> None:
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
    assert spearman([1, 2, 3], [1, 1, 1]) == 0
    assert spearman([1, 2, 3], [1, np.nan, 3]) == 0


@pytest.mark.parametrize(
    ("found", "f1"),
    [
        ([Box("a", (0, 0, 10, 9))], 1.0),  # overlap .9
        ([Box("a", (6, 0, 16, 10))], 0.0),  # overlap .25
        ([Box("b", (0, 0, 10, 10))], 0.0),
        ([Box("a", (0, 0, 10, 10))] * 2, 2 / 3),  # a box is used once
        ([], 0.0),
    ],
)
def test_boxes_that_overlap_count(found: list[Box], f1: float) -> None:
    assert same_boxes([[Box("a", (0, 0, 10, 10))]], [found]) == pytest.approx(f1)


def test_no_box_is_no_answer() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        same_boxes([[]], [[]])


def test_texts_are_the_same_at_every_call() -> None:
    assert _text_models.labelled(4, 1) == _text_models.labelled(4, 1)
    assert _text_models.labelled(4, 1) != _text_models.labelled(4, 2)
    useful = {passage: score for _, passage, score in _text_models.paired(64, 0)}
    assert all("song" not in passage or score > 0.7 for passage, score in useful.items())
    assert min(useful.values()) < 0.2 < 0.8 < max(useful.values())


# ---- docs/jobs.md


def blocks(page: str, section: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a section."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.M | re.DOTALL)
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.DOTALL)


def differences(page: str, section: str) -> list[str]:
    """Commands and code of a section that its jobs do not run, and commands that it lacks."""
    mine = [job for job in jobs.ALL if job.name.startswith(f"{section.lower()}/")]
    expected = list(dict.fromkeys(command for job in mine for command in job.commands))
    folder = Path(_job.__file__).parent
    sources = {
        language: (folder / f"{section.lower()}.{ending}").read_text(encoding="utf-8")
        for language, ending in (("python", "py"), ("js", "mjs"))
        if (folder / f"{section.lower()}.{ending}").is_file()
    }
    shown, faults = [], []
    for language, text in blocks(page, section):
        if language in sources:
            if text not in sources[language]:
                faults.append(f"code that is not run: {text}")
        else:
            shown += [row for row in text.splitlines() if row and not row.startswith("#")]
    faults += [f"not run: {command}" for command in shown if command not in expected]
    return faults + [f"not shown: {command}" for command in expected if command not in shown]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_shows_what_is_run(section: str) -> None:
    assert differences(PAGE, section) == []
    assert {language for language, _ in blocks(PAGE, section)} >= {"", "python"}


@pytest.mark.parametrize(
    ("old", "new", "faults"),
    [
        ("--variants int8,fp16 --no-bench", "--variants int8,q4 --no-bench", 2),
        ("qcompile export model -o float", "# exported", 1),
        ("model.encode(texts)", "model.encode(text)", 1),
        ('"feature-extraction", folder', '"feature-extraction", "folder"', 1),
    ],
)
def test_a_page_that_differs_is_seen(old: str, new: str, faults: int) -> None:
    assert old in PAGE
    assert len(differences(PAGE.replace(old, new), "Embed")) == faults
