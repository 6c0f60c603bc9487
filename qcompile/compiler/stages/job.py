"""One compilation on its way: what was asked, and what is known so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qcompile.calibration.calibration_file import Calibration
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.report import Report
from qcompile.compiler.stages.options import CompileOptions, Progress
from qcompile.data.feeds import Feed, Feeds
from qcompile.ir import Graph
from qcompile.ir.model_io.write_model import ModelFiles, externalize_weights
from qcompile.runtime import session
from qcompile.runtime.memory_budget import Budget
from qcompile.system import digests
from qcompile.system.memory import peak_memory, release_memory
from qcompile.targets.target import LoweringChoice, Mode, Target


@dataclass
class Job:
    """``reference`` is the float model as it came in, ``external`` what it keeps in other files;
    ``choices`` are ways of lowering other than the target's own;
    ``general_text`` are feeds beside the data, to foresee how far channels reach;
    ``held_back`` are feeds to verify with, ``data_digest`` is that of all feeds; ``lone_feed``:
    there is one only, for all purposes; ``quantized``: something was.
    """

    graph: Graph
    reference: bytes | Path
    recipe: Recipe
    target: Target
    mode: Mode
    options: CompileOptions
    progress: Progress
    report: Report
    feeds: Feeds | None
    budget: Budget
    external: tuple[Path, ...] = ()
    choices: list[LoweringChoice] = field(default_factory=list)
    general_text: Feeds | None = None
    held_back: list[Feed] = field(default_factory=list)
    data_digest: str = ""
    lone_feed: bool = False
    calibration: Calibration | None = None
    quantized: bool = False

    @cached_property
    def _apart(self) -> ModelFiles | None:
        return externalize_weights(self.reference) if isinstance(self.reference, Path) else None

    @property
    def running(self) -> bytes | Path:
        """The float model as the runtime is to load it: its weights in a file, which it maps."""
        return self.reference if self._apart is None else self._apart.path

    @cached_property
    def model_digest(self) -> str:
        """SHA-256 of the float model, with its external data."""
        return digests.of_model(self.reference, self.external)

    @property
    def provider(self) -> str:
        """What runs models here: the target's provider, or the CPU's where there is none."""
        return session.provider_or_cpu(self.target.provider)

    @property
    def is_away(self) -> bool:
        """True where the target's provider is missing: its answers are emulated, not its speed."""
        return self.provider != self.target.provider

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Account one stage's seconds and memory; what it freed goes back to the system."""
        start = time.perf_counter()
        yield
        self.report.seconds[name] = round(time.perf_counter() - start, 3)
        self.report.memory[name] = peak_memory()
        release_memory()
