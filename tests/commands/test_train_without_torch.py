"""``qcompile train`` where torch is not installed: one line, with what to install."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.compiler.training import training_checks
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.labelled_folder import write_classifier, write_labelled


def test_what_is_missing_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_checks, "find_spec", lambda _: None)
    folder, texts = write_classifier(tmp_path / "in"), write_labelled(tmp_path / "train.jsonl")
    result = run("train", folder, "-o", tmp_path / "out", "--data", texts, "--eval", texts)
    assert_one_line(result, 2, "training needs torch: pip install")
    assert not (tmp_path / "out").exists()
