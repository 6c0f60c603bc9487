"""What a caller may write in options."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile import DataError, Options, TrainingOptions


def test_paths_may_be_text() -> None:
    training = TrainingOptions("train.jsonl", "dev.jsonl", state="run.pt")  # type: ignore[arg-type]
    assert training == TrainingOptions(Path("train.jsonl"), Path("dev.jsonl"), state=Path("run.pt"))
    options = Options(tokenizer="a", dump_dir="b", search_state="c", bits_state="d")  # type: ignore[arg-type]
    assert options == Options(
        tokenizer=Path("a"), dump_dir=Path("b"), search_state=Path("c"), bits_state=Path("d")
    )
    assert TrainingOptions("train.jsonl").evaluation is None  # type: ignore[arg-type]


def test_texts_in_memory_are_no_training_data() -> None:
    with pytest.raises(DataError, match=r"data: expected the path of a file.*found list"):
        TrainingOptions(["a text"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"data: .*found NoneType"):
        TrainingOptions(None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"tokenizer: expected .*found dict"):
        Options(tokenizer={})  # type: ignore[arg-type]
