"""--text-columns: in every command that reads text, and checked before an export."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.compiler.model_folder import torch_export
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.written_folder import write_folder, write_text

QUICK = ("--no-bench", "--no-cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "f")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs of texts in columns of other names."""
    lines = write_text(tmp_path / "t.txt").read_text().splitlines()
    rows = [f"{i},{a},{b}" for i, (a, b) in enumerate(zip(lines, lines[::-1], strict=True))]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["id,question,passage", *rows]) + "\n")
    return path


def test_every_command_takes_columns(folder: Path, pairs: Path, tmp_path: Path) -> None:
    model, out = folder / "model.onnx", tmp_path / "out.onnx"
    data = ("--data", pairs, "--tokenizer", folder, "--text-columns", "question,passage")
    for command in (
        ("compile", model, "-o", out, *data, *QUICK),
        ("verify", model, out, *data),
        ("bench", model, out, *data, "--rounds", 1, "--seconds", 0.01),
        ("sensitivity", model, *data, "--by", "layer", "--measure", "alone", "--no-cache"),
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output


def test_columns_that_are_missing_are_named(folder: Path, pairs: Path, tmp_path: Path) -> None:
    def compiled(*columns: str) -> tuple[object, ...]:
        return ("compile", folder, "-o", tmp_path / "out", "--data", pairs, *columns, *QUICK)

    assert_one_line(run(*compiled()), 2, "line 2: no field 'text'", "found id, question, passage")
    result = run(*compiled("--text-columns", "question,answer"))
    assert_one_line(result, 2, "pairs.csv, line 2: no field 'answer'; found id, question, passage")
    for wrong in ("a,b,c", "a,", "a,a"):
        assert_one_line(run(*compiled("--text-columns", wrong)), 2, "name of a column")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--text-columns", "q"), "line 2: no field 'q'"),
        (("--text-columns", "question", "--max-length", "600"), "model takes 2 tokens at most"),
    ],
)
def test_data_is_checked_before_an_export(
    options: tuple[str, ...],
    said: str,
    folder: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def export(*_: object) -> None:
        raise AssertionError("exported before the data was checked")

    (folder / "model.onnx").unlink()
    header = b'{"e.position_embeddings.weight":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(32)
    (folder / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(torch_export, "export_folder", export)
    result = run("compile", folder, "-o", tmp_path / "out", "--data", pairs, *options)
    assert_one_line(result, 2, said)


def test_a_good_table_reaches_the_export(
    folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights whose header cannot be read are left to the export."""
    reached: list[object] = []
    monkeypatch.setattr(torch_export, "export_folder", lambda *given: reached.append(given))
    (folder / "model.onnx").unlink()
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    columns = ("--text-columns", "question", "--max-length", "600")
    run("compile", folder, "-o", tmp_path / "out", "--data", pairs, *columns)
    assert reached
