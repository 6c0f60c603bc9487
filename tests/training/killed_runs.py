"""Kills training runs of one process after another, and prints how each ended, as JSON.

A run is a forked process that ends itself with SIGKILL; the same run is started again until one of
them finishes and writes its outcome. ``test_kills`` starts this file and compares the outcomes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qcompile.training.labelled.metrics import Meter, Score
from tests.training.small_run import run, values

MOST_STARTS = 30


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfter:
    """Progress that ends the process after some steps of this process."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, name: str, total: int | None = None) -> None:
        """Steps that are not trained again are not counted."""

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            kill()


def nothing(_start: int) -> dict[str, Any]:
    return {}


def after_steps(steps: int) -> Callable[[int], dict[str, Any]]:
    """Each process ends after so many steps more than the one before has kept."""
    return lambda start: {"progress": KillAfter(steps * (start + 1))}


def while_writing(start: int) -> dict[str, Any]:
    """The process ends within a checkpoint, each a little later."""
    original, left = torch.save, [8 * start + 1]

    def save(held: object, file: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            file.write(b"half of it")
            file.flush()
            kill()
        original(held, file)

    patch.object(torch, "save", save).start()
    return {}


def while_evaluating(start: int) -> dict[str, Any]:
    """The process ends within its second evaluation."""
    original, left = Meter.score, [2]

    def score(meter: Meter) -> Score:
        left[0] -= 1
        if left[0] == 0:
            kill()
        return original(meter)

    patch.object(Meter, "score", score).start()
    return {}


HOW = {
    "never": nothing,
    "after steps": after_steps(7),
    "while writing": while_writing,
    "while evaluating": while_evaluating,
}


def until_finished(folder: Path, name: str) -> dict[str, Any]:
    """The outcome, and how often the run was killed before."""
    state, found = folder / f"{name}.pt", folder / f"{name}.json"
    for start in range(MOST_STARTS):
        child = os.fork()
        if not child:
            more = HOW[name](start)
            outcome, of = run(folder, state, **more)
            curve = [(point.step, point.loss, point.score.value) for point in outcome.curve]
            found.write_text(json.dumps({"curve": curve, "values": values(of)}))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not status:
            left = len(list(folder.glob(f".{name}*")))
            return {**json.loads(found.read_text()), "kills": start, "left": left}
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            break
    return {"failed": f"start {start}, status {status}"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())  # imports much, once for all processes
    print(json.dumps({name: until_finished(Path(sys.argv[1]), name) for name in HOW}))
