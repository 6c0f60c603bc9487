"""What a search has measured so far, in a small file: the same command goes on where it was.

One class measures and keeps for both searches, with one form of contents. They differ in where
users find them: those of ``compile`` in a file next to the output, which survives ``--no-cache``,
those of ``sensitivity`` in the cache. They are taken over only for the same model, data, recipe and
gates. Measurements are keyed by the samples and by the switches that were on, as a bit mask; a
search is a pure function of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from qcompile.compiler.config.lockfile import environment
from qcompile.compiler.search.measurable import Measurable
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
    """A file in the place of a cache: one entry, whatever its key. Raises OutputError."""

    path: Path

    def load(self, kind: str, key: str, read: Callable[[Path], T]) -> T | None:
        """What ``read`` makes of the file, None where there is none."""
        return read(self.path) if self.path.exists() else None

    def store(self, kind: str, key: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write the file whole or not at all."""
        with replacing(self.path) as file:
            write(file)

    def drop(self, kind: str = _KIND, key: str = "") -> None:
        """Remove the file, if it is there."""
        with suppress(FileNotFoundError):
            self.path.unlink()


@dataclass
class Measurements:
    """Measures, and keeps what was measured: ``scores`` of the switched model, by mask.

    ``tried``: scores of models that were compiled. ``samples``: how many the ranking uses, None
    before that is known. ``measured``: how many scores are of this run. ``kept_in`` None: nowhere.
    """

    meter: Meter
    digest: str
    kept_in: Cache | StateFile | None
    scores: dict[str, Score] = field(default_factory=dict)
    tried: dict[str, Score] = field(default_factory=dict)
    samples: int | None = None
    measured: int = 0
    _saved: float = field(default_factory=time.monotonic)

    @property
    def everything(self) -> frozenset[int]:
        """All switches on."""
        return self.meter.everything

    def __call__(self, on: Collection[int], samples: int = 0) -> Score:
        """What an earlier run measured, or the meter now."""
        key = f"{samples}:{mask(on)}"
        if key not in self.scores:
            self.scores[key] = self.meter(on, samples)
            self.measured += 1
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self.save()
        return self.scores[key]

    def take_over(self) -> None:
        """Go on with what an earlier run has kept of the same.

        Raises OutputError where the file is something else, which would be lost.
        """
        if self.kept_in is not None:
            self.kept_in.load(_KIND, self.digest, self._read)

    def save(self) -> None:
        """Write all that is known, where anything was measured. Raises what the store does."""
        if self.kept_in is not None and self.scores:
            self.kept_in.store(_KIND, self.digest, self._write)
        self._saved = time.monotonic()

    def drop(self) -> None:
        """Nothing is left to go on with."""
        self.scores.clear()
        if self.kept_in is not None:
            self.kept_in.drop(_KIND, self.digest)

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            if found["format"] != _FORMAT:
                raise ValueError(found["format"])
            if found["digest"] == self.digest:
                kept = _scores(found["scores"]), _scores(found["tried"]), found["samples"]
                self.scores, self.tried, self.samples = kept
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise OutputError(
                f"search state {str(path)!r} is no state of a search: move it away"
            ) from e

    def _write(self, file: IO[bytes]) -> None:
        content = {
            "format": _FORMAT,
            "digest": self.digest,
            "samples": self.samples,
            "scores": {k: asdict(s) for k, s in self.scores.items()},
            "tried": {k: asdict(s) for k, s in self.tried.items()},
        }
        file.write((json.dumps(content) + "\n").encode())


def measurements(
    found: Measurable, names: Iterable[str], kept_in: Cache | StateFile | None
) -> Measurements:
    """The meter, with the memory of earlier runs; ``names`` are those of the items.

    Raises OutputError where a file that is to hold them holds something else.
    """
    made = Measurements(found.meter, _digest(found, names), kept_in)
    made.take_over()
    return made


def _scores(plain: dict[str, dict[str, Any]]) -> dict[str, Score]:
    return {k: Score(**{**s, "failures": tuple(s["failures"])}) for k, s in plain.items()}


def _digest(found: Measurable, names: Iterable[str]) -> str:
    """Identity of what is measured: model, all data, recipe, gates, items, versions."""
    prepared, data = found.prepared, found.calibrated.held_out.digest
    metric = None if prepared.options.metric is None else resolve_metric(prepared.options.metric)[0]
    threads = prepared.options.threads or session.threads()
    model, recipe = prepared.float_model.digest, prepared.recipe.digest()
    settings = [environment(), threads, model, data, recipe, prepared.mode, metric]
    return key_of([*settings, asdict(prepared.gates), *names])


def mask(numbers: Iterable[int]) -> str:
    """A set of numbers as the hex digits of a bit mask."""
    return f"{sum(1 << n for n in numbers):x}"
