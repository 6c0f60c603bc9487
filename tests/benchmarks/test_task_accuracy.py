"""The scripts of models/ that train and score tasks: rows, batches, metrics, the table's lines.

Torch is not needed here: what only runs with it is imported, not called.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from benchmarks import task_accuracy as accuracy_script
from models import _labelled_text as tasks
from models import finetune_tasks as training
from qcompile.data.feeds import InputSpec
from qcompile.data.open_data import open_data
from qcompile.rewriting.testing import model_proto

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "no", "maybe", "so")
I64 = np.dtype(np.int64)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_padding(length=20)
    made.save(str(folder / "tokenizer.json"))


def test_rows_of_single_texts_pairs_and_scores(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "train.jsonl",
        [
            {"text": "yes", "label": "b", "fine": "b:c"},
            {"text_a": "yes", "text_b": "no", "label": 1},
            {"text_a": "yes", "text_b": "no", "score": 5},
        ],
    )
    path.write_text(path.read_text() + "\n")
    found = [(row.text, row.target) for row in tasks.read_rows(path)]
    assert found == [("yes", "b"), (("yes", "no"), 1), (("yes", "no"), 5.0)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n", "holds no rows"),
        ('{"text": "a", "label": 1}\n{"text": "a"}\n', "line 2: expected text"),
        ('{"text_a": "a", "label": 1}', "line 1: expected text"),
        ('{"text": "a", "score": "high"}', "line 1: expected text"),
        ("[1]", "line 1: expected text"),
        ("{", "line 1: not JSON"),
    ],
)
def test_a_malformed_split_is_one_line_with_its_place(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    said: str,
) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        tasks.read_rows(path)
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        tasks.read_rows(tmp_path / "dev.jsonl")


def test_labels_are_sorted_and_scores_have_none() -> None:
    rows = [tasks.Row("a", label) for label in ("x", "c", "x")]
    assert tasks.labels_of(rows) == ("c", "x")
    assert tasks.targets(rows, ("c", "x")).tolist() == [1, 0, 1]
    scored = [tasks.Row("a", 2.5), tasks.Row("b", 0.0)]
    assert tasks.labels_of(scored) == ()
    assert tasks.targets(scored, ()).tolist() == [2.5, 0.0]


def test_a_label_that_training_lacks_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tasks.targets([tasks.Row("a", "z")], ("c", "x"))
    assert "'z' is none of the 2 labels" in capsys.readouterr().err


def test_metrics() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
    assert tasks.accuracy(logits, np.array([0, 1, 0, 0])) == 75
    other = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
    assert tasks.flips(logits, other) == 25
    assert tasks.flips(logits, logits * 3) == 0
    assert tasks.flips(np.array([[1.0], [2.0]]), np.array([[1.5], [1.0]])) == 0.75


def test_spearman_ranks_ties_by_their_mean() -> None:
    up = np.array([1.0, 2.0, 3.0, 4.0])
    assert tasks.spearman(up, np.exp(up)) == pytest.approx(100, abs=1e-9)  # float rounding
    assert tasks.spearman(up, -up) == pytest.approx(-100, abs=1e-9)
    # Ranks 1, 2.5, 2.5, 4 against 1 to 4: covariance 4.5, variances 4.5 and 5.
    tied = tasks.spearman(np.array([1.0, 2.0, 2.0, 4.0]), up)
    assert tied == pytest.approx(100 * 4.5 / np.sqrt(4.5 * 5), abs=1e-9)


def test_the_metric_is_the_tasks() -> None:
    regression = tasks.Task("s", "dev", "spearman", 16)
    examples = tasks.Examples(regression, [], np.array([1.0, 2.0, 3.0]))
    assert tasks.metric(examples, np.array([[5.0], [6.0], [9.0]])) == pytest.approx(100)
    binary = tasks.Task("b", "dev", "accuracy", 16, ("n", "y"))
    examples = tasks.Examples(binary, [], np.array([1, 0]))
    assert tasks.metric(examples, np.array([[0.0, 1.0], [0.0, 1.0]])) == 50


def test_batches_hold_rows_of_like_length_and_logits_return_to_their_rows(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    texts: list[tasks.Text] = ["yes no maybe so", "yes", ("no", "maybe"), "so"]
    rows = [tasks.Row(text, 0.0) for text in texts]
    examples = tasks.examples_of(tasks.Task("t", "dev", "spearman", 5), rows, tmp_path)
    ((order, feed),) = examples.feeds
    assert order == [1, 3, 0, 2]
    assert feed["input_ids"].tolist() == [
        [2, 4, 3, 0, 0],
        [2, 7, 3, 0, 0],
        [2, 4, 5, 6, 3],  # truncated
        [2, 5, 3, 6, 3],
    ]
    assert feed["attention_mask"].sum(1).tolist() == [3, 3, 5, 5]
    assert feed["token_type_ids"][3].tolist() == [0, 0, 0, 1, 1]
    logits = tasks.gather(examples, [np.array([[1.0], [3.0], [0.0], [2.0]])])
    assert logits.tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert tasks.batches([3, 1, 2], 2) == [[1, 2], [0]]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        tasks.encode(["yes"], tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        tasks.encode(["yes"], tmp_path, 8)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [training.schedule(step, 20) for step in range(21)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == 0
    assert training.schedule(0, 1) == 1


def test_training_batches_have_every_row_once_and_follow_the_seed() -> None:
    lengths = [1 + i * 7 % 50 for i in range(1000)]
    first = training.shuffled(lengths, np.random.default_rng(0))
    assert sorted(i for batch in first for i in batch) == list(range(1000))
    assert first == training.shuffled(lengths, np.random.default_rng(0))
    assert first != training.shuffled(lengths, np.random.default_rng(1))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first]
    assert np.mean(spread) < 10  # of 50: rows are sorted within windows of 512


def test_tasks_are_chosen_by_name() -> None:
    assert [t.task.name for t in training.chosen("stsb,rte")] == ["stsb", "rte"]
    with pytest.raises(SystemExit, match="2"):
        training.chosen("rte,nli")


def test_a_task_starts_from_the_one_before_it(tmp_path: Path) -> None:
    (rte,) = training.chosen("rte")
    with pytest.raises(SystemExit, match="2"):
        training.start_of(rte, tmp_path)
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "model.safetensors").touch()
    assert training.start_of(rte, tmp_path) == tmp_path / "stsb"


def test_calibration_texts_are_read_by_qcompile(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rows = [tasks.Row(text, 0) for text in (("yes", "no"), ("so", "maybe so"))]
    fields = [accuracy_script.text_fields(row) for row in rows]
    assert fields[0] == {"text_a": "yes", "text_b": "no"}
    assert accuracy_script.text_fields(tasks.Row("yes", 0)) == {"text": "yes"}
    path = write_rows(tmp_path / "calibration.jsonl", fields)
    spec = InputSpec("input_ids", I64, ("batch", "seq"))
    (feed,) = open_data(path, (spec,), tokenizer=tmp_path)
    assert feed["input_ids"].tolist() == [[2, 4, 3, 5, 3, 0], [2, 7, 3, 6, 7, 3]]


def write_task(folder: Path, data: Path) -> None:
    """A classifier whose two logits are sums of embeddings, and the splits of its task."""
    text = """g (int64[b,s] input_ids) => (float[b,2] logits) {
        e = Gather(table, input_ids)
        m = ReduceMean<axes = [1], keepdims = 0>(e)
        logits = MatMul(m, w)
    }"""
    random = np.random.default_rng(0)
    weights = {"table": random.normal(size=(8, 4)), "w": random.normal(size=(4, 2))}
    model = model_proto(text, **{n: v.astype(np.float32) for n, v in weights.items()})
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    write_tokenizer(folder)
    rows = [{"text": f"{a} {b}", "label": a} for a in ("yes", "no") for b in WORDS[4:]]
    write_rows(data / "toy" / "train.jsonl", rows)
    write_rows(data / "toy" / "test.jsonl", rows[::-1])
    task = {"name": "toy", "split": "test", "metric": "accuracy", "max_length": 16}
    (folder / "task.json").write_text(json.dumps(task | {"labels": ["no", "yes"], "score": 50.0}))


@pytest.mark.parametrize("as_json", [True, False])
def test_the_whole_script_on_a_tiny_classifier(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    write_task(tmp_path / "toy", tmp_path / "data")
    (tmp_path / "float.yaml").write_text("mode: float\n")
    argv = ["x", str(tmp_path / "toy"), "--data", str(tmp_path / "data"), "--recipe", "default"]
    argv += ["--recipe", str(tmp_path / "float.yaml"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", argv + ["--json"] * as_json)
    accuracy_script.main()
    out = capsys.readouterr().out
    if not as_json:
        lines = out.splitlines()
        assert [line.count("|") for line in lines] == [10] * 4
        assert lines[2].startswith("| toy | default | accuracy, test | 8 |")
        return
    found = json.loads(out)
    assert [row["n"] for row in found] == [8, 8]
    assert found[1]["float_score"] == found[1]["score"]
    assert found[1]["flips"] == 0
    assert found[0]["cosine"] > 0.99
    assert found[0]["cosine"] < found[1]["cosine"] == pytest.approx(1, abs=1e-6)  # float32


def test_lines_of_accuracy_and_of_regression() -> None:
    outcome = accuracy_script.Outcome
    made = outcome("rte", "default", "accuracy", "dev", 277, 60.0, 59.5, -0.5, 1.25, 0.99871)
    assert accuracy_script.line(made) == (
        "| rte | default | accuracy, dev | 277 | 60.00 | 59.50 | -0.50 | 1.25 % | 0.9987 |"
    )
    made = outcome("stsb", "default", "spearman", "dev", 1500, 86.0, 86.0, 0.0, 0.0312, 0.9999)
    assert "| +0.00 | 0.0312 |" in accuracy_script.line(made)


def test_the_cosine_of_a_regression_is_of_all_predictions() -> None:
    a, b = np.array([[1.0], [0.0]]), np.array([[1.0], [1.0]])
    assert accuracy_script.mean_cosine(a, b) == pytest.approx(np.sqrt(0.5))
    # Row by row: orthogonal, then equal.
    a, b = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 1.0], [2.0, 2.0]])
    assert accuracy_script.mean_cosine(a, b) == pytest.approx(0.5)


@pytest.mark.parametrize("content", [None, "{", '{"name": "rte"}', "[]"])
def test_a_folder_that_is_no_task(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "task.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        accuracy_script.read_task(tmp_path)
