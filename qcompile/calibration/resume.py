"""One calibration in the cache: finished, or as far as its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from qcompile.calibration import calibration_file
from qcompile.calibration.calibration_file import Calibration
from qcompile.calibration.collector import Collector
from qcompile.errors import DataError
from qcompile.quant import Array
from qcompile.system import npz_archive
from qcompile.system.resume_cache import Cache

_WHOLE, _PART = "calibration", "partial"
_SHARE = 20  # seconds of work at least for a second of writing checkpoints
FORMAT, VERSION = "qcompile checkpoint", 1
Checkpoint = tuple[dict[str, Any], dict[str, Array]]


@dataclass
class ResumableCalibration:
    """``notes`` are the report's: what was found in the cache is told there."""

    cache: Cache
    key: str
    notes: list[str] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def finished(self, tensors: set[str]) -> Calibration | None:
        """What an earlier run found, None where there is none that covers these tensors."""
        found = self.cache.load(_WHOLE, self.key, calibration_file.read_calibration)
        if found is None or not found.covers(tensors):
            return None
        if not self.cache.is_own(_WHOLE, self.key):
            self.notes.append("calibration was taken from an earlier run (--no-cache repeats it)")
        return found

    def resumed(self, fresh: Callable[[], Collector]) -> Collector:
        """A collector, where it was at the last checkpoint if there is one."""
        made = fresh()
        found = self.cache.load(_PART, self.key, read_states)
        if found is None:
            return made
        try:
            restore(made, found)
        except DataError as e:
            self.notes.append(f"ignored: {e}")
            return fresh()
        self.notes.append(
            f"calibration continued after {made.feeds_seen} feeds of an earlier run "
            "(--no-cache starts again)"
        )
        return made

    def checkpoint(self, made: Collector) -> None:
        """Keep what is known, where the last time is long ago; between two feeds only."""
        begun = time.monotonic()
        if begun - self.last < max(self.cache.every, _SHARE * self.took):
            return
        known = states(made)
        if known is not None:
            self.cache.store(_PART, self.key, lambda file: write_states(file, made, known))
        self.last = time.monotonic()
        self.took = self.last - begun if self.cache.every else 0.0

    def finish(self, found: Calibration) -> None:
        """Keep the whole in place of the part."""
        self.cache.store(
            _WHOLE, self.key, lambda file: calibration_file.write_calibration(file, found)
        )
        self.cache.drop(_PART, self.key)


def states(made: Collector) -> list[dict[str, Array]] | None:
    """Of all observers; None where one of them keeps none."""
    found = [tap.observer.state() for tap in made.taps]
    known = [state for state in found if state is not None]
    return known if len(known) == len(found) else None


def write_states(file: IO[bytes], made: Collector, known: list[dict[str, Array]]) -> None:
    """Write to a binary stream what the collector knows between two feeds."""
    shapes = [[[[n, list(s)] for n, s in key], sizes] for key, sizes in made.counted.items()]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "feeds": made.feeds_seen,
        "tensors": [tap.tensor for tap in made.taps],
        "faults": [tap.fault or "" for tap in made.taps],
        "counted": shapes,  # how feeds are divided depends on it
    }
    arrays = {f"{i}/{name}": a for i, state in enumerate(known) for name, a in state.items()}
    npz_archive.write_archive(file, manifest, arrays)


def read_states(path: Path) -> Checkpoint:
    """Manifest and arrays. Raises DataError where the file is missing, damaged or another's."""
    return npz_archive.read_archive(path, FORMAT, VERSION)


def restore(made: Collector, found: Checkpoint) -> None:
    """Bring a fresh collector to where the checkpoint was.

    Raises DataError where it is another's; the collector is spoilt then.
    """
    manifest, arrays = found
    try:
        if manifest["tensors"] != [tap.tensor for tap in made.taps]:
            raise ValueError("it is of other tensors")
        for i, (tap, fault) in enumerate(zip(made.taps, manifest["faults"], strict=True)):
            tap.observer.restore(_own(arrays, f"{i}/"))
            tap.fault = str(fault) or None
        for key, sizes in manifest["counted"]:
            shapes = tuple((str(n), tuple(map(int, s))) for n, s in key)
            made.counted[shapes] = {str(t): int(size) for t, size in sizes.items()}
        made.feeds_seen = int(manifest["feeds"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"a checkpoint of calibration does not fit: {e}") from e


def _own(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
