"""benchmarks/trained_tasks.py: its table, and that runs are kept. Nothing is trained here."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import trained_tasks
from benchmarks.trained_tasks import SETTINGS, Run
from qcompile import TrainingOptions

RUNS = [
    Run("rte", "qdq W8A8", 0, 65.0, 64.0, 65.5, 0.01, 25, 100, 60.0, 10**9),
    Run("rte", "qdq W8A8", 1, 65.0, 63.0, 65.5, 0.03, 25, 100, 180.0, 2 * 10**9),
    Run("trec", "qdq W8A8", 0, 97.0, 97.0, 96.5, None, 25, 100, 120.0, 10**9),
]


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    folder = tmp_path / "trec"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"model")
    task = {"name": "trec", "split": "test", "metric": "accuracy", "max_length": 64}
    (folder / "task.json").write_text(json.dumps({**task, "labels": ["a", "b"]}))
    return argparse.Namespace(
        folders=[folder], data=tmp_path, work=tmp_path, epochs=1.0, threads=1, seeds=1
    )


def test_names_differ() -> None:
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)


def test_a_line_has_means_over_seeds() -> None:
    found = trained_tasks.line(SETTINGS[0], ["rte", "trec", "mrpc"], RUNS)
    assert found == (
        "| qdq W8A8 | 4.0 | -1.50 → +0.50 | +0.00 → -0.50 | - | -1.00 → +0.17 | 2.0 - - | 2 | 2.0 |"
    )


def test_settings_by_name() -> None:
    assert [s.name for s in trained_tasks.chosen(["cpu W8*"])] == [
        "cpu W8A8",
        "cpu W8A8, distilled",
    ]
    with pytest.raises(SystemExit):
        trained_tasks.chosen(["gpu*"])


def test_what_is_measured(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = SimpleNamespace(float=97.0, calibrated=90.0, compiled=96.0, flips=0.02)
    account = SimpleNamespace(metric=metric, seconds=60.0)
    memory = {"load": 5, "train": 9, "verify": 9}
    report = SimpleNamespace(training=account, bytes=10, float_bytes=100, memory=memory)
    calls: list[dict[str, object]] = []

    def train(*_given: object, **settings: object) -> SimpleNamespace:
        calls.append(settings)
        return SimpleNamespace(report=report)

    monkeypatch.setattr("qcompile.train", train)
    options = TrainingOptions(Path("a"), Path("b"))
    found = trained_tasks.trained(args.folders[0], SETTINGS[1], 3, options, 1)
    assert (found.calibrated, found.trained, found.task, found.seed) == (90.0, 96.0, "trec", 3)
    assert found.memory == 9 and calls[0]["weight_bits"] == 4 and calls[0]["seed"] == 3


@pytest.mark.parametrize(("texts", "epochs"), [(2999, 3.0), (3000, 1.0)])
def test_small_tasks_are_trained_longer(tmp_path: Path, texts: int, epochs: float) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n" * texts)
    assert trained_tasks.usual_epochs(tmp_path / "train.jsonl") == epochs


def test_a_run_is_kept(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def submit(
        _pool: object, _do: object, _folder: Path, _setting: object, seed: int, *_: object
    ) -> Any:
        asked.append(seed)
        return SimpleNamespace(result=lambda: replace(RUNS[2], seed=seed))

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", submit)
    first, again = (trained_tasks.run(args.folders[0], SETTINGS[1], 0, args, "c") for _ in "12")
    assert first == again and asked == [0]
    other = trained_tasks.run(args.folders[0], SETTINGS[1], 1, args, "c")
    assert asked == [0, 1] and other.seed == 1
