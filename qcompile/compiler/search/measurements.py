"""What a search has measured so far, in a small file: the same command goes on where it was.

The file is taken only for the same model, data, recipe and gates. Measurements are keyed by the
samples and by the switches that were on, as a bit mask; a search is a pure function of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from qcompile.compiler.config.lockfile import environment
from qcompile.compiler.report.notes import Note
from qcompile.compiler.search.measurable import Measurable
from qcompile.compiler.search.sensitivity import Meter, Score
from qcompile.errors import OutputError
from qcompile.runtime import session
from qcompile.runtime.evaluation.user_metric import named
from qcompile.system.atomic_write import write_atomic
from qcompile.system.resume_cache import Cache, key_of

_FORMAT = "qcompile search"
_KIND = "search"
SAVE_EVERY = 5.0  # seconds between writes


@dataclass
class State:
    """``scores`` of the switched model, ``tried`` of models that were compiled; by mask.

    ``samples``: how many the ranking uses, None before that is known. ``path`` None: not kept.
    """

    path: Path | None
    digest: str
    scores: dict[str, Score] = field(default_factory=dict)
    tried: dict[str, Score] = field(default_factory=dict)
    samples: int | None = None

    def save(self) -> None:
        """Write the file whole, where anything was measured. Raises OutputError."""
        if self.path is not None and self.scores:
            write_atomic(self.path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's contents."""
        content = {
            "format": _FORMAT,
            "digest": self.digest,
            "samples": self.samples,
            "scores": {k: asdict(s) for k, s in self.scores.items()},
            "tried": {k: asdict(s) for k, s in self.tried.items()},
        }
        return (json.dumps(content) + "\n").encode()

    def remove(self) -> None:
        """No trace is left."""
        if self.path is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()


def load(path: Path | None, digest: str) -> State:
    """The state of that digest, empty where there is none.

    Raises OutputError where the file is something else: it would be lost.
    """
    made = State(path, digest)
    if path is None or not path.exists():
        return made
    try:
        found = json.loads(path.read_text())
        if found["format"] != _FORMAT:
            raise ValueError(found["format"])
        if found["digest"] == digest:
            made.samples = found["samples"]
            made.scores = {k: _score(s) for k, s in found["scores"].items()}
            made.tried = {k: _score(s) for k, s in found["tried"].items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OutputError(
            f"search state {str(path)!r} is no state of a search: move it away"
        ) from e
    return made


def _score(plain: dict[str, Any]) -> Score:
    return Score(**{**plain, "failures": tuple(plain["failures"])})


def digest(found: Measurable, names: Iterable[str]) -> str:
    """Identity of what is measured: model, all data, recipe, gates, items, versions."""
    prepared, data = found.prepared, found.calibrated.held_out.digest
    metric = None if prepared.options.metric is None else named(prepared.options.metric)[0]
    threads = prepared.options.threads or session.threads()
    model, recipe = prepared.float_model.digest, prepared.recipe.digest()
    settings = [environment(), threads, model, data, recipe, prepared.mode, metric]
    return key_of([*settings, asdict(prepared.gates), *names])


def mask(on: Collection[int], samples: int) -> str:
    """What a measurement is known by."""
    return f"{samples}:{sum(1 << s for s in on):x}"


@dataclass
class Recorder:
    """Measures, and keeps what was measured in a cache: the same command goes on where it was."""

    meter: Meter
    cache: Cache
    state: State
    saved: float = field(default_factory=time.monotonic)

    @property
    def everything(self) -> frozenset[int]:
        """All switches on."""
        return self.meter.everything

    def __call__(self, on: Collection[int], samples: int = 0) -> Score:
        """What an earlier run measured, or the meter now."""
        key = mask(on, samples)
        if key not in self.state.scores:
            self.state.scores[key] = self.meter(on, samples)
            if time.monotonic() - self.saved > SAVE_EVERY:
                self.save()
        return self.state.scores[key]

    def save(self) -> None:
        """Write all that is known."""
        self.cache.store(_KIND, self.state.digest, lambda file: _write(file, self.state))
        self.saved = time.monotonic()


def recorder(found: Measurable, names: Iterable[str]) -> tuple[Recorder | Meter, list[Note]]:
    """The meter, with the memory of earlier runs where there is a cache."""
    cache = found.prepared.options.cache
    if cache is None:
        return found.meter, []
    key, notes = digest(found, names), []
    known = cache.load(_KIND, key, lambda path: load(path, key))
    if known is not None and known.scores:
        kept = f"{len(known.scores)} measurements were taken over from an earlier run"
        notes.append(Note("measurements-resumed", f"{kept} (--no-cache: anew)"))
    return Recorder(found.meter, cache, known or State(None, key)), notes


def _write(file: IO[bytes], state: State) -> None:
    file.write(state.to_bytes())
