"""Requests for one model: back to back in several streams, or arriving at a rate.

Closed loop: every stream sends its next request when the last one is answered. That measures the
capacity. Open loop: requests arrive at times drawn in advance (a Poisson process), whether or not
earlier ones were answered, as users of a server do. Latency counts from the arrival, so that the
time in which a request waits for a free stream is part of it. A generator that waits for the model
would send fewer requests just when the model is slow, and leave out the worst latencies
(Schroeder, Wierman, Harchol-Balter, "Open Versus Closed: A Cautionary Tale", NSDI 2006, section 2).

Requests are answered first come, first served: a free stream takes the next number and sleeps until
that request arrives. So no further thread hands out requests.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from qcompile.data.feeds import Feed, sample_count
from qcompile.errors import DataError
from qcompile.quant import Array

Call = Callable[[Feed], object]  # runs one feed
_FEWEST = 10  # requests that are expected to arrive in a round
_MOST = 1_000_000  # the same: their times are drawn in advance
MOST_STREAMS = 1024


@dataclass(frozen=True)
class Load:
    """What is asked of each model.

    streams: requests that are computed at the same time. arrival: requests per second, arriving at
    random (open loop); None sends them back to back (closed loop). seed: of arrivals and of the
    order of the feeds. Raises DataError for values out of range.
    """

    streams: int = 1
    arrival: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MOST_STREAMS:
            raise DataError(f"streams {self.streams}: expected 1 to {MOST_STREAMS}")
        if self.arrival is not None and not (self.arrival > 0 and math.isfinite(self.arrival)):
            raise DataError(f"arrival {self.arrival:g}: expected requests per second, over 0")
        if self.seed < 0:
            raise DataError(f"seed {self.seed}: expected 0 or more")

    def check_seconds(self, seconds: float) -> None:
        """Raises DataError where too few or too many requests arrive in a round."""
        expected = seconds * (self.arrival or _FEWEST)
        if _FEWEST <= round(expected, 6) <= _MOST or self.arrival is None:
            return
        limit, word = (_FEWEST, "least") if expected < _FEWEST else (_MOST, "most")
        raise DataError(
            f"arrival {self.arrival:g}: about {expected:.3g} requests in a round of {seconds:g} s, "
            f"expected at {word} {limit} (--seconds {limit / self.arrival:.3g})"
        )

    def plan(self, number: int, seconds: float, feeds: int) -> Plan:
        """What is sent in round ``number``, the same for every model."""
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(feeds)
        if self.arrival is None:
            return Plan(seconds, order)
        return Plan(seconds, order, _poisson(rng, self.arrival, seconds))


def _poisson(rng: np.random.Generator, rate: float, seconds: float) -> Array:
    """Arrival times of a Poisson process: the gaps are exponential with mean 1 / rate.

    At least one, which may be later.
    """
    count = int(rate * seconds + 10 * math.sqrt(rate * seconds) + 10)  # 10 standard deviations
    times = np.cumsum(rng.exponential(1 / rate, count))
    return times[: max(1, int(np.searchsorted(times, seconds)))]


@dataclass(frozen=True)
class Plan:
    """One round. order: indices of the feeds that are sent, again and again. arrivals: seconds from
    the start of the round, ascending; None sends requests back to back."""

    seconds: float
    order: Array
    arrivals: Array | None = None


class Clock(Protocol):
    """Time in seconds; tests have one of their own."""

    def now(self) -> float: ...

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Sleep, at most until ``stop`` is set."""


class WallClock:
    """The clock of this machine."""

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        stop.wait(seconds)


class Answer(NamedTuple):
    """One request that was answered: times in seconds from the start of the round."""

    arrival: float
    start: float
    end: float
    samples: int


@dataclass
class _Stream:
    """What one stream did: its answers, when it ended, and how long it waited for arrivals."""

    answers: list[Answer] = field(default_factory=list)
    end: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True)
class LoadRound:
    """What the streams did in one round."""

    plan: Plan
    streams: list[_Stream]

    @property
    def answers(self) -> list[Answer]:
        return [a for s in self.streams for a in s.answers]

    @property
    def latencies(self) -> list[float]:
        """Milliseconds from the arrival of each answered request to its answer."""
        return [(a.end - a.arrival) * 1e3 for a in self.answers]

    @property
    def queue_ms(self) -> float:
        """Mean milliseconds from the arrival of an answered request to its start."""
        return float(np.mean([(a.start - a.arrival) * 1e3 for a in self.answers]))

    @property
    def runs_per_second(self) -> float:
        return self._rate(lambda a: 1)

    @property
    def samples_per_second(self) -> float:
        return self._rate(lambda a: a.samples)

    def _rate(self, weight: Callable[[Answer], int]) -> float:
        """Closed loop: the sum over streams, each over its own time, since their last runs do not
        end together. Open loop: what was answered within the round."""
        if self.plan.arrivals is None:
            return sum(sum(map(weight, s.answers)) / s.end for s in self.streams)
        seconds = self.plan.seconds
        return sum(weight(a) for a in self.answers if a.end <= seconds) / seconds

    @property
    def capacity(self) -> float:
        """Runs per second if streams never waited for arrivals: answers per busy stream time."""
        busy = sum(s.end - s.idle for s in self.streams)
        return len(self.answers) * len(self.streams) / busy

    @property
    def waiting(self) -> int:
        """Requests that had arrived by the end of the round and were not yet started."""
        if self.plan.arrivals is None:
            return 0
        return self.arrived - sum(a.start <= self.plan.seconds for a in self.answers)

    @property
    def arrived(self) -> int:
        return len(self.answers if self.plan.arrivals is None else self.plan.arrivals)

    @property
    def unanswered(self) -> int:
        """Requests that were given up, as the queue had not emptied a round's time later."""
        return self.arrived - len(self.answers)


def send(
    calls: Sequence[Call], feeds: Sequence[Feed], plan: Plan, clock: Clock | None = None
) -> LoadRound:
    """Send the requests of a plan to one stream per call, each in a thread of its own.

    Closed loop: streams stop after the first answer behind the end of the round. Open loop: all
    requests that arrived are answered, but none is started later than twice the round's time.
    Raises the first error of any stream, and on an interrupt joins the threads first.
    """
    round_ = _Round(feeds, plan, clock or WallClock())
    streams = [_Stream() for _ in calls]
    threads = [
        threading.Thread(target=round_.serve, args=pair, name=f"stream {i}")
        for i, pair in enumerate(zip(calls, streams, strict=True))
    ]
    try:
        for thread in threads:
            thread.start()
        round_.begin()
        for _ in threads:
            round_.ended.acquire()  # an interrupt of join() would count as its end (3.11)
    finally:
        round_.end()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()
    if round_.errors:
        raise round_.errors[0]
    return LoadRound(plan, streams)


class _Round:
    """What the threads of a round share."""

    def __init__(self, feeds: Sequence[Feed], plan: Plan, clock: Clock) -> None:
        self.errors: list[BaseException] = []
        self._sent = [(feeds[i], sample_count(feeds[i])) for i in plan.order]
        self._plan, self._clock = plan, clock
        self._numbers = itertools.count()  # next() of it is atomic: one call into C
        self._ready, self._stop = threading.Event(), threading.Event()
        self.ended = threading.Semaphore(0)  # streams
        self._start = 0.0

    def begin(self) -> None:
        """Let the streams start, at the same time."""
        self._start = self._clock.now()
        self._ready.set()

    def end(self) -> None:
        """Let streams end after the run that they are in."""
        self._stop.set()
        self._ready.set()

    def serve(self, call: Call, stream: _Stream) -> None:
        """Answer requests until the round is over: the thread of one stream."""
        self._ready.wait()
        try:
            for number, arrival in self._requests(stream):
                feed, samples = self._sent[number % len(self._sent)]
                start = self._now()
                call(feed)
                stream.answers.append(Answer(arrival, start, self._now(), samples))
        except BaseException as e:  # the main thread raises it
            self.errors.append(e)
            self._stop.set()
        stream.end = self._now()
        self.ended.release()

    def _requests(self, stream: _Stream) -> Iterator[tuple[int, float]]:
        """Number and arrival of each request that this stream answers, once it has arrived."""
        arrivals, seconds = self._plan.arrivals, self._plan.seconds
        while not self._stop.is_set():
            now = self._now()
            if arrivals is None:
                if now >= seconds and stream.answers:
                    return
                yield next(self._numbers), now
                continue
            number = next(self._numbers)
            if number >= len(arrivals) or now >= 2 * seconds:
                return
            arrival = float(arrivals[number])
            if arrival > now:
                self._clock.wait(arrival - now, self._stop)
                stream.idle += self._now() - now
            if not self._stop.is_set():
                yield number, arrival

    def _now(self) -> float:
        return self._clock.now() - self._start
