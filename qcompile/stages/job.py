"""One compilation on its way: what was asked, and what is known so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from qcompile.calibration.calibration_file import Calibration
from qcompile.config import lockfile
from qcompile.config.lockfile import Lock
from qcompile.config.recipe import Recipe
from qcompile.data.feeds import Feed, Feeds
from qcompile.errors import GateError, OutputError
from qcompile.evaluation.user_metric import Metric
from qcompile.ir.graph import Graph
from qcompile.model_io.write_model import Written, apart_from
from qcompile.planning.context import Mode
from qcompile.report.report import Report
from qcompile.runtime import session
from qcompile.runtime.memory_budget import Budget
from qcompile.system import digests
from qcompile.system.processor import peak_memory, release_memory
from qcompile.system.resume_cache import Cache
from qcompile.targets.target import Choice, Target


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
class Options:
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


@dataclass
class Result:
    """The compiled model, in files that live as long as this, and how it came to be.

    ``lock`` where ``Options.keep_lock`` or ``keep_calibration`` asked for it, ``calibration`` where
    the latter did.
    """

    written: Written
    report: Report
    lock: Lock | None = None
    calibration: Calibration | None = None

    @property
    def model(self) -> bytes:
        """The model's file; over 2 GiB the weights are in another one, which ``save`` writes."""
        return self.written.path.read_bytes()

    def save(self, path: str | Path) -> None:
        """Write the model whole or not at all. Raises OutputError."""
        self.written.save(Path(path))

    def save_lock(self, path: str | Path, *, light: bool = False) -> None:
        """Write the lock, NAME.yaml, and its calibration, NAME.npz, unless it is to be ``light``.

        Raises OutputError, also where what is to be written was not kept.
        """
        if self.lock is None or (self.calibration is None and self.lock.is_light and not light):
            what = "no calibration was kept for the lock" if self.lock else "no lock was kept"
            raise OutputError(f"{what}: compile with Options(keep_calibration=True)")
        lockfile.save(Path(path), self.lock, None if light else self.calibration)


class RejectedError(GateError):
    """A gate failed; ``result`` holds what would have been written. ``where`` leads the message."""

    def __init__(self, result: Result, where: str = "") -> None:
        super().__init__(where + "; ".join(result.report.failures))
        self.result = result


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
    options: Options
    progress: Progress
    report: Report
    feeds: Feeds | None
    budget: Budget
    external: tuple[Path, ...] = ()
    choices: list[Choice] = field(default_factory=list)
    general_text: Feeds | None = None
    held_back: list[Feed] = field(default_factory=list)
    data_digest: str = ""
    lone_feed: bool = False
    calibration: Calibration | None = None
    quantized: bool = False

    @cached_property
    def _apart(self) -> Written | None:
        return apart_from(self.reference) if isinstance(self.reference, Path) else None

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
