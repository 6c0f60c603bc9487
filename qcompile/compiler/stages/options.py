"""What the caller of a compilation asks for, and how it hears of progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import Note
from qcompile.data.open_data import Data
from qcompile.ir.model_io.read_model import Source
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.evaluation.user_metric import Metric
from qcompile.system.resume_cache import Cache


class Progress(Protocol):
    """What the command line shows of long work."""

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


@dataclass(frozen=True)
class CompileOptions:
    """How to compile, beside the recipe: data handling, checks, limits.

    max_memory: bytes that the process may take beside its libraries (about 300 MB); None is no
    limit. threads: 0 is one a core.
    metric: the user's own measure of feeds and outputs, or its name, for ``Gates.min_metric``.
    search_time: seconds in which tensors may be lifted to more bits where the result is not close
    enough; 0 is no search. search_state: file that keeps measurements of a search cut short.
    stem: of the output's name, for a file of weights beside it. lock: the build to repeat, whose
    recipe is the job's. keep_lock: the result has a lock, for ``Result.save_lock``, a light one.
    keep_calibration: it has the calibration too, which a full lock needs. cache: where calibration
    is kept for a run after an interrupt; whoever has written the result calls its ``forget``.
    profile: also take the time of each kind of operator, where anything is timed. tune: time the
    target's forms, and keep the faster ones.
    """

    tokenizer: Path | None = None
    samples: int | None = None
    batch_size: int | None = None
    max_memory: int | None = None
    threads: int = 0
    verify: bool = True
    bench: bool = True
    bench_rounds: int = 6
    profile: bool = False
    tune: bool = False
    force: bool = False
    dump_dir: Path | None = None
    metric: Metric | str | None = None
    search_time: float = 0.0
    search_state: Path | None = None
    stem: str = "model"
    lock: Lock | None = None
    keep_lock: bool = False
    keep_calibration: bool = False
    cache: Cache | None = None


@dataclass(frozen=True)
class Request:
    """Everything that one compilation is asked.

    data: None where there is none. name: of the model in the report; by default that of its file.
    notes: what the caller knows of the compilation, for the report.
    """

    model: Source
    data: Data | None
    recipe: Recipe = field(default_factory=Recipe)
    gates: Gates = field(default_factory=Gates)
    options: CompileOptions = field(default_factory=CompileOptions)
    progress: Progress = field(default_factory=Silent)
    name: str | None = None
    notes: tuple[Note, ...] = ()

    @property
    def source(self) -> str:
        """The name of the model's file."""
        model = self.model
        return Path(model).name if isinstance(model, str | Path) else "model in memory"
