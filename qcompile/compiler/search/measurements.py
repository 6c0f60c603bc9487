"""What a search has measured so far, in a small file from which the same command resumes.

``compile`` and ``sensitivity`` share the class and the file format. They differ in the place: a
file next to the output for ``compile``, which survives ``--no-cache``, the cache for
``sensitivity``. Measurements are reused only for the same model, data, recipe and gates. They are
keyed by the number of samples and by the switches that were on, as a bit mask; a search is a pure
function of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from qcompile.compiler.cluster.workers import LOCAL, Workers
from qcompile.compiler.config.lockfile import environment
from qcompile.compiler.search.measurable import Measurable
from qcompile.compiler.search.measuring_task import Measured, MeasuringTask, measured
from qcompile.compiler.search.sensitivity import Meter, Score
from qcompile.errors import OutputError
from qcompile.runtime import session
from qcompile.runtime.evaluation.user_metric import resolve_metric
from qcompile.system.atomic_write import replacing
from qcompile.system.resume_cache import Cache, key_of

T = TypeVar("T")
_FORMAT = "qcompile search"
_KIND = "search"
_SAVE_EVERY = 5.0  # seconds between writes


@dataclass(frozen=True)
class StateFile:
    """A file with the interface of a cache: one entry, whatever its key. Raises OutputError."""

    path: Path

    def load(self, kind: str, key: str, read: Callable[[Path], T]) -> T | None:
        """The result of ``read`` for the file; None where there is no file."""
        return read(self.path) if self.path.exists() else None

    def store(self, kind: str, key: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write the file atomically."""
        with replacing(self.path) as file:
            write(file)

    def drop(self, kind: str = _KIND, key: str = "") -> None:
        """Remove the file, if it is there."""
        with suppress(FileNotFoundError):
            self.path.unlink()


@dataclass
class Measurements:
    """Measures, and stores the results: ``scores`` of the fake-quantized model, by mask.

    ``tried``: scores of models that were compiled, ``figures``: their bytes, and what was timed, by
    the same keys. ``samples``: how many the ranking uses, None
    before that is known. ``measured``: how many scores this run added. ``store`` None: they are
    not written. ``workers``: measure where there are several scores to take.
    """

    meter: Meter
    digest: str
    store: Cache | StateFile | None
    scores: dict[str, Score] = field(default_factory=dict)
    tried: dict[str, Score] = field(default_factory=dict)
    samples: int | None = None
    measured: int = 0
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    workers: Workers = LOCAL
    _saved: float = field(default_factory=time.monotonic)

    @property
    def everything(self) -> frozenset[int]:
        """All switches on."""
        return self.meter.everything

    def __call__(self, on: Collection[int], samples: int = 0) -> Score:
        """The score that an earlier run measured, or a new one."""
        return self.remember(f"{samples}:{bit_mask(on)}", lambda: self.meter(on, samples))

    def each(self, sets: Sequence[Collection[int]], samples: int = 0) -> Generator[Score]:
        """The score of each set of switches, in their order."""
        keys = [f"{samples}:{bit_mask(on)}" for on in sets]
        return self.remember_each(self.meter, keys, [measured(on, samples) for on in sets])

    def remember_each(
        self, meter: Meter, keys: Sequence[str], items: Sequence[Measured]
    ) -> Generator[Score]:
        """The scores under these keys; workers measure those that are missing, by ``meter``.

        Closing the iterator cancels what is not measured.
        """
        wanted = dict(zip(keys, items, strict=True))
        missing = {key: item for key, item in wanted.items() if key not in self.scores}
        asked = list(missing.values())
        scores = self.workers.map(MeasuringTask(meter), asked) if asked else _none()
        with closing(scores):
            for key in keys:
                if missing.pop(key, None) is not None:
                    self._add(key, next(scores))
                yield self.scores[key]

    def remember(self, key: str, measure: Callable[[], Score]) -> Score:
        """The score that an earlier run measured under this key, or that of ``measure``."""
        if key not in self.scores:
            self._add(key, measure())
        return self.scores[key]

    def _add(self, key: str, found: Score) -> None:
        self.scores[key] = found
        self.measured += 1
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def resume(self) -> None:
        """Read what an earlier run stored for the same inputs.

        Raises OutputError where the file is something else, which would be overwritten.
        """
        if self.store is not None:
            self.store.load(_KIND, self.digest, self._read)

    def save(self) -> None:
        """Write all scores, if there are any. Raises what the store does."""
        if self.store is not None and self.scores:
            self.store.store(_KIND, self.digest, self._write)
        self._saved = time.monotonic()

    def drop(self) -> None:
        """Forget all scores, so that nothing is resumed."""
        self.scores.clear()
        if self.store is not None:
            self.store.drop(_KIND, self.digest)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(content["format"])
            if content["digest"] == self.digest:
                scores, tried = _scores(content["scores"]), _scores(content["tried"])
                self.scores, self.tried, self.samples = scores, tried, content["samples"]
                self.figures = dict(content["figures"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise OutputError(
                f"search state {str(path)!r} was not written by a search: move the file"
            ) from e

    def _write(self, file: IO[bytes]) -> None:
        content = {
            "format": _FORMAT,
            "digest": self.digest,
            "samples": self.samples,
            "scores": {k: asdict(s) for k, s in self.scores.items()},
            "tried": {k: asdict(s) for k, s in self.tried.items()},
            "figures": self.figures,
        }
        file.write((json.dumps(content) + "\n").encode())


def open_measurements(
    model: Measurable, names: Iterable[str], store: Cache | StateFile | None
) -> Measurements:
    """The meter, with the scores of earlier runs; ``names``: of the items that are measured.

    Raises OutputError where the state file holds something else.
    """
    workers = model.prepared.options.workers
    opened = Measurements(model.meter, _digest(model, names), store, workers=workers)
    opened.resume()
    return opened


def _none() -> Generator[Score]:
    yield from ()


def _scores(content: dict[str, dict[str, Any]]) -> dict[str, Score]:
    return {k: Score(**{**s, "failures": tuple(s["failures"])}) for k, s in content.items()}


def _digest(measured: Measurable, names: Iterable[str]) -> str:
    """Identity of what is measured: model, all data, recipe, gates, items, versions."""
    prepared, data = measured.prepared, measured.calibrated.held_out.digest
    metric = None if prepared.options.metric is None else resolve_metric(prepared.options.metric)[0]
    threads = prepared.options.threads or session.threads()
    model, recipe = prepared.float_model.digest, prepared.recipe.digest()
    providers = prepared.calibrating_provider, prepared.ranking_provider
    settings = [environment(), threads, *providers, model, data, recipe, prepared.mode, metric]
    return key_of([*settings, asdict(prepared.gates), *names])


def bit_mask(numbers: Iterable[int]) -> str:
    """A set of numbers as the hex digits of a bit mask."""
    return f"{sum(1 << n for n in numbers):x}"
