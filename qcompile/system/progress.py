"""What long work shows while it runs, and the time and memory of each stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from qcompile.system.memory import peak_memory, release_memory

_LOG = logging.getLogger(__name__)


@runtime_checkable
class Progress(Protocol):
    """What is shown of long work."""

    def step(self, name: str, total: int | None = None) -> None:
        """A new step begins; ``total`` units, None where unknown."""

    def advance(self) -> None:
        """One unit of the current step is done."""


class Silent:
    """No progress shown."""

    def step(self, name: str, total: int | None = None) -> None:
        """Nothing to show."""

    def advance(self) -> None:
        """Nothing to show."""


@dataclass
class Stopwatch:
    """Stages in the order in which they ended.

    seconds: of each. memory: peak bytes of the process until the end of each.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage, and return freed memory to the system."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.memory[name] = peak_memory()
        _LOG.debug("%s: %.3f s, peak memory %d bytes", name, self.seconds[name], self.memory[name])
        release_memory()
