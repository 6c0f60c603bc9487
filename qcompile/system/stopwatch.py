"""Time and memory of each stage of a compilation."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qcompile.system.memory import peak_memory, release_memory

_LOG = logging.getLogger(__name__)


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
