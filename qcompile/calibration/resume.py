"""One calibration in the cache: finished, or as far as its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qcompile.calibration import calibration_file, checkpoint
from qcompile.calibration.calibration_file import Calibration
from qcompile.calibration.collector import Collector
from qcompile.errors import DataError
from qcompile.system.resume_cache import Cache

_WHOLE, _PART = "calibration", "partial"
_SHARE = 20  # seconds of work at least for a second of writing checkpoints


@dataclass
class Kept:
    """``notes`` are the report's: what was found in the cache is told there."""

    cache: Cache
    key: str
    notes: list[str]
    last: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def finished(self, tensors: set[str]) -> Calibration | None:
        """What an earlier run found, None where there is none that covers these tensors."""
        found = self.cache.load(_WHOLE, self.key, calibration_file.read)
        if found is None or not found.covers(tensors):
            return None
        if not self.cache.is_own(_WHOLE, self.key):
            self.notes.append("calibration was taken over from an earlier run (--no-cache: anew)")
        return found

    def resumed(self, fresh: Callable[[], Collector]) -> Collector:
        """A collector, where it was at the last checkpoint if there is one."""
        made = fresh()
        found = self.cache.load(_PART, self.key, checkpoint.read)
        if found is None:
            return made
        try:
            checkpoint.restore(made, found)
        except DataError as e:
            self.notes.append(f"ignored: {e}")
            return fresh()
        self.notes.append(
            f"calibration went on after {made.feeds_seen} feeds that an earlier run had seen "
            "(--no-cache: anew)"
        )
        return made

    def checkpoint(self, made: Collector) -> None:
        """Keep what is known, where the last time is long ago; between two feeds only."""
        begun = time.monotonic()
        if begun - self.last < max(self.cache.every, _SHARE * self.took):
            return
        known = checkpoint.states(made)
        if known is not None:
            self.cache.store(_PART, self.key, lambda file: checkpoint.write(file, made, known))
        self.last = time.monotonic()
        self.took = self.last - begun if self.cache.every else 0.0

    def finish(self, found: Calibration) -> None:
        """Keep the whole in place of the part."""
        self.cache.store(_WHOLE, self.key, lambda file: calibration_file.write(file, found))
        self.cache.drop(_PART, self.key)
