"""What a search has measured so far, in a small file: the same command goes on where it was.

The file is taken only for the same model, data, recipe and gates. Measurements are keyed by the
samples and by the switches that were on, as a bit mask; a search is a pure function of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompile._version import __version__
from qcompile.errors import OutputError
from qcompile.export import write_atomic
from qcompile.job import Job
from qcompile.metric import named
from qcompile.ranking import Score

_FORMAT = "qcompile search"


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
        if self.path is None or not self.scores:
            return
        content = {
            "format": _FORMAT,
            "digest": self.digest,
            "samples": self.samples,
            "scores": {k: s.to_dict() for k, s in self.scores.items()},
            "tried": {k: s.to_dict() for k, s in self.tried.items()},
        }
        write_atomic(self.path, (json.dumps(content) + "\n").encode())

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


def digest(job: Job, names: Iterable[str]) -> str:
    """Identity of what is searched: model, held-back data, recipe, gates, items.

    The calibration data goes in by its count alone: a result is verified whatever was measured.
    """
    found = hashlib.sha256()
    model = job.reference if isinstance(job.reference, bytes) else job.reference.read_bytes()
    found.update(hashlib.sha256(model).digest())
    metric = None if job.options.metric is None else named(job.options.metric)[0]
    settings = [__version__, job.report.float_bytes, job.recipe.digest(), job.mode, metric]
    settings += [asdict(job.report.gates), job.report.calibration.get("feeds"), *names]
    found.update(json.dumps(settings, sort_keys=True).encode())
    for feed in job.held_back:
        for name, array in sorted(feed.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
    return found.hexdigest()
