"""Several processes that train one model together, one for each device, as torchrun starts them.

Each has the whole model and computes a part of every batch. Gradients are added up over all of
them, so all take the same steps. The first process keeps the state, and goes on alone when training
is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from qcompile.errors import TrainingError

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Processes:
    """``rank``: the number of this process, from 0, of ``count``."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that keeps and writes what was learned."""
        return self.rank == 0

    def own(self, parts: Sequence[_Part]) -> Sequence[_Part]:
        """What this process computes of the parts of a batch."""
        return parts[self.rank :: self.count]

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by the sum of those of all processes."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # a process without a part of this batch
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def sum(self, value: float) -> float:
        """The sum of the values of all processes."""
        if self.count == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return float(total)

    def of_first(self, value: float) -> float:
        """The value of the first process, such as the time that has passed."""
        return self.sum(value if self.is_first else 0.0)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.sum(0.0)


@contextmanager
def joined(device: torch.device | None = None) -> Iterator[Processes]:
    """The processes that torchrun started, with their devices; else this one alone.

    device: of a single process; None for CUDA where present. Raises TrainingError where the other
    processes cannot be reached.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    has_cuda = torch.cuda.is_available()
    if count == 1:
        yield Processes(device or torch.device("cuda" if has_cuda else "cpu"))
        return
    where = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if has_cuda else "cpu")
    try:
        distributed.init_process_group("nccl" if has_cuda else "gloo")
    except (ValueError, RuntimeError) as e:
        raise TrainingError(
            f"WORLD_SIZE is {count}, but the processes do not find each other: {e}; start them by "
            "torchrun"
        ) from e
    try:
        yield Processes(where, distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
