"""What the caller of a compilation asks for, and how progress is reported."""

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
    """How to compile, in addition to the recipe: data handling, checks, limits.

    Attributes:
        tokenizer: folder that holds tokenizer.json, for text data.
        samples: the most samples to read; None is all, of text 256.
        batch_size: samples per batch of text or .npz; None is 8.
        max_length: the most tokens of a text; None is the tokenizer's own limit, 128 at most.
        max_memory: bytes that the process may use in addition to its libraries (about 300 MB).
        threads: of ONNX Runtime; 0 is one per core.
        verify: compare the result with the float model.
        bench: time both models.
        bench_rounds: rounds in which each is timed once.
        profile: where anything is timed, also take the time of each kind of operator.
        tune: time the target's lowering options and keep the faster ones.
        force: return the result although a gate failed.
        dump_dir: folder for the graph after each pass, as text.
        metric: the user's own measure of feeds and outputs, or its name, for ``Gates.min_metric``.
        search_time: seconds to search for tensors that need more bits if an accuracy gate fails; 0
            is no search.
        search_state: file that keeps the measurements of an interrupted search.
        stem: of the output's file name, for a file of weights next to it.
        lock: the build to repeat; its recipe is the one used.
        keep_lock: the result has a light lock, for ``Result.save_lock``.
        keep_calibration: the result has the calibration too, which a full lock needs.
        cache: where calibration is kept, so that an interrupted run can resume; call its ``forget``
            once the result is written.
    """

    tokenizer: Path | None = None
    samples: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
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
    """All arguments of one compilation.

    name: of the model in the report, by default its file name. notes: from the caller, for the
    report.
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
