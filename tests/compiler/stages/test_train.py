"""The stage ``train``: what excludes it, its checks before and after, its metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, TrainingOptions
from qcompile.compiler.report.records import TrainingMetric
from qcompile.compiler.stages import train
from qcompile.compiler.stages.options import Request, SizeLimit
from qcompile.compiler.training import trained_file, training_checks
from qcompile.errors import DataError, RecipeError, TrainingError
from qcompile.quant import Array
from tests.compiler.model_folder.labelled_folder import write_classifier, write_labelled
from tests.compiler.model_folder.written_folder import write_folder, write_text

pytest.importorskip("torch")

METRIC = TrainingMetric("accuracy", 8, 90.0, 60.0, 89.0, 88.5, 1.5, 1.0)


def request(path: Path, **options: Any) -> Request:
    training = TrainingOptions(path, distill=True)
    return Request(path, str(path), options=Options(training=training, **options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tune": True}, "--tune"),
        ({"max_size": SizeLimit.parse("10%")}, "--max-size"),
        ({"search_time": 9.0}, "--search-time"),
    ],
)
def test_searches_exclude_training(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=f"{named}.*give train the recipe"):
        training_checks.check_request(request(Path("t.txt"), **options))
    training_checks.check_request(replace(request(Path("t.txt")), options=Options(**options)))


def test_texts_are_read_from_a_file_of_texts() -> None:
    with pytest.raises(DataError, match=r"x\.npz.*expected .*\.jsonl"):
        training_checks.check_request(request(Path("x.npz")))


def test_the_gate_on_the_metric_needs_a_limit() -> None:
    (failure,) = trained_file.dropped(METRIC)
    for part in ("88.50", "1.50 points below", "90.00", "--max-drop 1", "alone gives 60.00"):
        assert part in failure
    for changed in ({"drop": 1.0}, {"max_drop": None}, {"drop": -3.0}):
        assert not [*trained_file.dropped(replace(METRIC, **changed))]
    assert [*trained_file.dropped(replace(METRIC, drop=float("nan")))]


def test_flips_are_other_classes_than_the_float_models() -> None:
    logits = np.array([[0.0, 1, 2], [3, 1, 0], [0, 4, 1], [1, 0, 0]])
    flips, mask = trained_file.Flips(), np.ones((4, 7), bool)
    assert flips.share is None
    flips.update(logits, logits * 2, mask)
    assert flips.share == 0
    flips.update(logits, -logits, mask)
    assert flips.share == 4 / 8


def test_padding_does_not_flip() -> None:
    flips = trained_file.Flips()
    logits = np.eye(2)[None]  # one text of two tokens
    flips.update(logits, logits[:, [1, 1]], np.array([[False, True]]))
    assert flips.share == 0
    flips.update(logits, logits[:, [1, 1]], np.array([[True, True]]))
    assert flips.share == 1 / 3


# ---- on a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_classifier(tmp_path_factory.mktemp("train") / "in")
    write_labelled(made.parent / "train.jsonl", 32)
    write_labelled(made.parent / "dev.jsonl", 16, seed=1)
    return made


def trained(folder: Path, **training: Any) -> qcompile.Result:
    given = {"evaluation": folder.parent / "dev.jsonl", "steps": 1, **training}
    options = TrainingOptions(folder.parent / "train.jsonl", **given)
    return qcompile.train(folder, options, target="qdq", options=Options(bench=False, threads=1))


def test_a_float_module_that_differs_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompile.training import inference

    def off(module: Any, feed: dict[str, Array]) -> dict[str, Array]:
        return {name: 1.001 * found for name, found in run(module, feed).items()}

    run = inference.run_module
    monkeypatch.setattr(inference, "run_module", off)
    with pytest.raises(TrainingError, match="in torch is not what ONNX Runtime computes"):
        trained(folder)


def test_a_file_that_is_not_what_was_trained_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write-back that loses the biases is seen."""
    from qcompile.training import write_back

    monkeypatch.setattr(write_back, "_write_constants", lambda *_: None)
    with pytest.raises(qcompile.RejectedError, match="the file is not what was trained"):
        trained(folder, steps=8, learning_rate=0.1, max_drop=None)


def test_what_is_measured_reaches_the_report(folder: Path) -> None:
    found = trained(folder).report.training
    assert found is not None and found.agreement is not None and found.agreement.holds
    assert found.metric is not None and found.metric.samples == 16
    assert found.curve[0].metric == found.metric.calibrated
    assert found.weights >= 4 and found.ranges > 0 and found.device == "cpu"


def test_not_verified_is_not_compared(folder: Path) -> None:
    training = TrainingOptions(folder.parent / "train.jsonl", folder.parent / "dev.jsonl", steps=1)
    options = Options(bench=False, verify=False, threads=1)
    found = qcompile.train(folder, training, target="qdq", options=options).report.training
    assert found is not None and found.metric is None and found.agreement is None


def test_an_encoder_has_no_labels(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    text = write_text(tmp_path / "t.txt")
    with pytest.raises(TrainingError, match=r"gives embeddings.*--distill"):
        qcompile.train(folder, TrainingOptions(text, text), target="qdq")


def test_labels_of_the_evaluation_count_where_there_are_some(tmp_path: Path) -> None:
    texts = {
        "a.jsonl": '\n{"text": "a", "label": 1}\n', "b.jsonl": '{"text": "a"}\n', "c.txt": "label",
        "d.csv": "text,score\na,1\n", "e.csv": "text\nlabel\n", "f.jsonl": "no json",
    }  # fmt: skip
    found = {}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
        found[name] = train.has_labels(tmp_path / name)
    assert [n for n, yes in found.items() if yes] == ["a.jsonl", "d.csv"]


def test_gates_of_a_model_that_learned_from_labels() -> None:
    off = Gates(max_flips=0.1).without_defaults("max_flips")
    assert (off.min_cosine, off.min_r2, off.max_flips) == (None, None, 0.1)
    assert (off.max_latency_ratio, off.max_size_ratio) == (1.0, 1.0)
    assert Gates().without_defaults().max_flips is None
    assert np.isfinite(Gates().min_cosine or np.nan)  # the defaults stay
