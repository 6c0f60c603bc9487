"""A checkpoint is read whole, by its own run, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import pytest
import torch

from qcompile.errors import OutputError, TrainingError
from qcompile.training.loop import checkpoint

RUN = {"data": "1", "graph": "2"}
STATE = {"step": 3, "values": {"w": torch.arange(1000.0)}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.pt"
    checkpoint.save(file, RUN, STATE)
    return file


def test_what_was_saved_is_loaded(path: Path) -> None:
    found = checkpoint.load(path, dict(reversed(RUN.items())))
    assert found is not None and found["step"] == 3
    assert torch.equal(found["values"]["w"], torch.arange(1000.0))
    assert checkpoint.load(path.with_name("other.pt"), RUN) is None


@pytest.mark.parametrize("length", [0, 1, 100, 3000, -1])
def test_a_truncated_file_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(TrainingError, match=r"run.pt' cannot be read: .*delete it to start again"):
        checkpoint.load(path, RUN)


def test_a_changed_number_is_refused(path: Path) -> None:
    held = path.read_bytes()
    number = torch.arange(500.0, 501).numpy().tobytes()
    assert held.count(number) == 1
    path.write_bytes(held.replace(number, b"\1" * 4))
    with pytest.raises(TrainingError, match="cannot be read: check sum of"):
        checkpoint.load(path, RUN)


class Malicious:
    """Runs code where it is unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.arange(3), "is no checkpoint of this version"),
        ({"format": "qcompile training 0"}, "is no checkpoint of this version"),
        ({"format": "qcompile training 1", "run": RUN, "state": STATE}, "no checkpoint of this"),
        ({"format": "qcompile training 2", "run": RUN}, "is incomplete"),
        ({"format": "qcompile training 2", "state": STATE}, "is incomplete"),
        (Malicious(), "cannot be read"),
    ],
)
def test_files_of_something_else(path: Path, held: object, message: str) -> None:
    torch.save(held, path)
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=message):
        checkpoint.load(path, RUN)
    assert path.read_bytes() == before


def test_another_run_is_named(path: Path) -> None:
    with pytest.raises(TrainingError, match="belongs to a run with other graph; delete it"):
        checkpoint.load(path, RUN | {"graph": "3"})
    with pytest.raises(TrainingError, match="other settings, data;"):
        checkpoint.load(path, {"graph": "2", "settings": "4"})


def test_what_a_killed_run_left_is_removed(path: Path) -> None:
    left = path.with_name(f".{path.name}.abc")
    left.write_bytes(b"half")
    other = path.with_name(".other.pt.abc")
    other.write_bytes(b"half")
    checkpoint.load(path, RUN)
    assert not left.exists() and other.exists()


def test_a_failure_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(held: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore")

    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(OutputError, match=r"cannot write .*failed writing file$"):
            checkpoint.save(path, RUN, STATE)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match="does not exist"):
        checkpoint.save(path.parent / "none" / "run.pt", RUN, STATE)
