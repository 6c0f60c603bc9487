"""Several processes that train together learn what one learns, and one of them keeps it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompile.errors import TrainingError
from qcompile.training.loop.processes import Processes, joined
from tests.training.small_run import LABELS_ALONE, run, values

ROOT = Path(__file__).parents[2]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def together(folder: Path, count: int) -> list[dict[str, Any]]:
    """The outcomes of processes as torchrun starts them."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.test_processes", str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [p.returncode for p in started] == [0] * count, [stderr for _, stderr in ended]
    return [json.loads(stdout) for stdout, _ in ended]


def outcome(folder: Path) -> dict[str, Any]:
    found, of = run(folder, folder / "run.pt", objective=LABELS_ALONE)
    return {"first": found.is_first, "losses": [p.loss for p in found.curve], **values(of)}


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    alone = outcome(tmp_path / "alone")
    first, second = together(tmp_path / "together", 2)
    assert (alone.pop("first"), first.pop("first"), second.pop("first")) == (True, True, False)
    assert first == second  # one sum of gradients for both
    assert first.pop("losses")[1:] == pytest.approx(alone.pop("losses")[1:], rel=1e-4)
    for name, expected in alone.items():
        # Gradients are float32 sums in another order, which 24 steps of Adam amplify.
        np.testing.assert_allclose(first[name], expected, atol=2e-3, err_msg=name)
    assert (tmp_path / "together" / "run.pt").is_file()


def test_a_part_belongs_to_one_process() -> None:
    cpu = torch.device("cpu")
    owned = [Processes(cpu, rank, 2).own(list("abc")) for rank in range(2)]
    assert [list(own) for own in owned] == [["a", "c"], ["b"]]


def test_one_process_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as alone:
        assert alone.is_first and alone.sum(2.5) == 2.5 == alone.of_first(2.5)
        alone.wait()


def test_processes_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainingError, match=r"WORLD_SIZE is 2.*start them by torchrun"), joined():
        pass


if __name__ == "__main__":
    print(json.dumps(outcome(Path(sys.argv[1]))))
