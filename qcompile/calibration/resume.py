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
FORMAT, VERSION = "qcompile checkpoint", 3
Checkpoint = tuple[dict[str, Any], dict[str, Array]]


@dataclass
class ResumableCalibration:
    """One calibration's entries in the cache; ``notes``, for the report, say what was reused."""

    cache: Cache
    key: str
    notes: list[str] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def finished(self, tensors: set[str]) -> Calibration | None:
        """The calibration of an earlier run, None where none covers these tensors."""
        found = self.cache.load(_WHOLE, self.key, calibration_file.read_calibration)
        if found is None or not found.covers(tensors):
            return None
        if not self.cache.is_own(_WHOLE, self.key):
            self.notes.append(
                "calibration was taken from an earlier run (--no-cache runs it again)"
            )
        return found

    def resumed(self, fresh: Callable[[], Collector]) -> Collector:
        """A collector in the state of the last checkpoint, or a fresh one."""
        collector = fresh()
        saved = self.cache.load(_PART, self.key, read_states)
        if saved is None:
            return collector
        try:
            restore(collector, saved)
        except DataError as e:
            self.notes.append(f"ignored: {e}")
            return fresh()
        self.notes.append(
            f"calibration continued after {collector.feeds_seen} feeds of an earlier run "
            "(--no-cache starts again)"
        )
        return collector

    def checkpoint(self, collector: Collector) -> None:
        """Save the collector's state if the last time is long enough ago; between feeds only."""
        begun = time.monotonic()
        if begun - self.last < max(self.cache.every, _SHARE * self.took):
            return
        observed = states(collector)
        if observed is not None:
            self.cache.store(_PART, self.key, lambda file: write_states(file, collector, observed))
        self.last = time.monotonic()
        self.took = self.last - begun if self.cache.every else 0.0

    def finish(self, found: Calibration) -> None:
        """Store the finished calibration, and drop the checkpoint."""
        self.cache.store(
            _WHOLE, self.key, lambda file: calibration_file.write_calibration(file, found)
        )
        self.cache.drop(_PART, self.key)


def states(collector: Collector) -> list[dict[str, Array]] | None:
    """The states of all observers; None where one of them has none."""
    found = [tap.observer.state() for tap in collector.taps]
    saved = [state for state in found if state is not None]
    return saved if len(saved) == len(found) else None


def write_states(file: IO[bytes], collector: Collector, observed: list[dict[str, Array]]) -> None:
    """Write a collector's state between two feeds to a binary stream."""
    shapes = [[[[n, list(s)] for n, s in key], sizes] for key, sizes in collector.counted.items()]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "feeds": collector.feeds_seen,
        "tensors": [tap.tensor for tap in collector.taps],
        "values": [tap.values for tap in collector.taps],
        "faults": [tap.fault or "" for tap in collector.taps],
        "counted": shapes,  # how feeds are divided depends on it
    }
    arrays = {f"{i}/{name}": a for i, state in enumerate(observed) for name, a in state.items()}
    npz_archive.write_archive(file, manifest, arrays.items())


def read_states(path: Path) -> Checkpoint:
    """Manifest and arrays. Raises DataError where the file is missing, damaged or foreign."""
    return npz_archive.read_archive(path, FORMAT, VERSION)


def restore(collector: Collector, checkpoint: Checkpoint) -> None:
    """Bring a fresh collector to the state of the checkpoint.

    Raises DataError where it belongs to another calibration; the collector is unusable then.
    """
    manifest, arrays = checkpoint
    try:
        if manifest["tensors"] != [tap.tensor for tap in collector.taps]:
            raise ValueError("it is of other tensors")
        saved = zip(collector.taps, manifest["values"], manifest["faults"], strict=True)
        for i, (tap, values, fault) in enumerate(saved):
            tap.observer.restore(_own(arrays, f"{i}/"))
            tap.values = int(values)
            tap.fault = str(fault) or None
        for key, sizes in manifest["counted"]:
            shapes = tuple((str(n), tuple(map(int, s))) for n, s in key)
            collector.counted[shapes] = {str(t): int(size) for t, size in sizes.items()}
        collector.feeds_seen = int(manifest["feeds"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"a checkpoint of calibration does not fit: {e}") from e


def _own(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
