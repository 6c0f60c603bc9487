"""models/random_architectures.py says of each architecture whether it was exported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from models import random_architectures


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["random_architectures.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        random_architectures.main()
    return int(ended.value.code or 0)


def test_what_cannot_be_exported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, folder: Path) -> None:
        if name == "wavlm":
            raise KeyError("no such task\nand more")
        folder.mkdir()
        (folder / "model.onnx").touch()

    monkeypatch.setattr(random_architectures, "write", write)
    assert run([str(tmp_path), "vit", "wavlm"], monkeypatch) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "vit: model.onnx"
    assert said[1].startswith("wavlm: not exported: KeyError: 'no such task")
    assert run([str(tmp_path), "wavlm"], monkeypatch) == 1


def test_an_unknown_name_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(tmp_path), "lenet"], monkeypatch) == 2
    assert "unknown architecture 'lenet', expected one of albert, " in capsys.readouterr().err
