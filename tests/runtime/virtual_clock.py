"""A clock whose time passes only while every stream sleeps: load that takes no real time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from qcompile.data.feeds import Feed


class VirtualClock:
    """Time in seconds. It moves on to the next end of a sleep once all streams sleep.

    Streams are the threads that ``send`` names so.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[int, float] = {}
        self._changed = threading.Condition()

    def now(self) -> float:
        return self._now

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Sleep, at most until ``stop`` is set."""
        own = threading.get_ident()
        with self._changed:
            end = self._ends[own] = self._now + seconds
            while self._now < end and not stop.is_set():
                first = min(self._ends.values())
                if len(self._ends) == running() and first > self._now:
                    self._now = first
                    self._changed.notify_all()
                else:
                    self._changed.wait(0.001)  # streams may end without a notice
            del self._ends[own]

    def run(self, seconds: float) -> Callable[[Feed], None]:
        """A model whose run takes exactly this time."""
        return lambda _feed: self.wait(seconds, threading.Event())


def running() -> int:
    """Streams that have not ended."""
    return sum(t.name.startswith("stream ") for t in threading.enumerate())
