"""Side-by-side latency: one live session at a time, rounds in turn, ratios within a round.

Two live sessions disturb each other (spinning threads), and a shared machine drifts: so each round
loads, warms up and times the models one after the other, and models are compared by the ratio of
their times in the same round. The interval is a bootstrap over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from qcompile.runtime import session as runtime
from qcompile.runtime.profiler import Profile
from qcompile.runtime.session import Feed, Session, SessionOptions
from qcompile.system import memory, processor
from qcompile.system.json_values import Record, members
from qcompile.system.processor import Environment

_NOISY = 1.25  # spread of one model's round medians over which the machine counts as noisy
_RESAMPLES = 2000
_SLOW = 0.4  # seconds: a run that is shorter is cheap to repeat
_LEVEL = (2.5, 97.5)


# A model for ONNX Runtime, or what makes, for a number of threads, a function that runs one feed.
Runnable = bytes | Path | Callable[[int], Callable[[Feed], Any]]


@dataclass(frozen=True)
class TimingOptions:
    """``seconds``: timed per model and round, in at least ``min_runs`` runs; one, of slow models.

    Before, as many seconds or ``warmup`` runs are not timed, whichever is less.
    """

    threads: int = 0
    rounds: int = 6
    seconds: float = 0.4
    min_runs: int = 3
    warmup: int = 5
    provider: str = "CPUExecutionProvider"


@dataclass
class Timing:
    """Latencies of one model in milliseconds, one list a round."""

    label: str
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        return [t for r in self.rounds for t in r]

    @property
    def best(self) -> float:
        return min(self.all)

    @property
    def median(self) -> float:
        return float(np.median(self.all))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.all, 90))

    @property
    def medians(self) -> list[float]:
        """One median for each round."""
        return [float(np.median(r)) for r in self.rounds]

    @property
    def noisy(self) -> bool:
        return max(self.medians) / min(self.medians) > _NOISY


@dataclass(frozen=True)
class Ratio:
    """Candidate over reference time: the median of round ratios, its interval, and of the bests."""

    median: float
    low: float
    high: float
    best: float


@dataclass(frozen=True)
class TimedModel(Record):
    """Latencies of one model, and over the reference's where it is another one."""

    model: str
    best_ms: float
    median_ms: float
    p90_ms: float
    runs: int
    ratio: Annotated[float | None, "the median of the rounds' ratios; not of the reference"] = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_best: float | None = None

    JSON = members("model best_ms median_ms p90_ms runs ratio? ratio_low? ratio_high? ratio_best?")


@dataclass
class Comparison(Record):
    """Timings of all models for one set of input shapes; the first is the reference."""

    timings: list[Timing]
    shapes: dict[str, list[int]]
    threads: int
    seed: int = 0
    profile: list[Profile] | None = None

    JSON = members("shapes threads rounds noisy session_options models **environment profile?")

    def ratio(self, index: int) -> Ratio:
        """Model ``index`` over the reference."""
        reference, candidate = self.timings[0], self.timings[index]
        ratios = np.array(candidate.medians) / np.array(reference.medians)
        rng = np.random.default_rng(self.seed)
        picks = rng.integers(0, len(ratios), (_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), _LEVEL)
        best = candidate.best / reference.best
        return Ratio(float(np.median(ratios)), float(low), float(high), best)

    @property
    def noisy(self) -> bool:
        return any(t.noisy for t in self.timings)

    @property
    def models(self) -> list[TimedModel]:
        """One row for each model, in the order in which they were given."""
        rows = []
        for i, t in enumerate(self.timings):
            row = TimedModel(t.label, t.best, t.median, t.p90, len(t.all))
            if i:
                ratio = self.ratio(i)
                row = replace(
                    row,
                    ratio=ratio.median,
                    ratio_low=ratio.low,
                    ratio_high=ratio.high,
                    ratio_best=ratio.best,
                )
            rows.append(row)
        return rows

    @property
    def rounds(self) -> int:
        return len(self.timings[0].rounds)

    @property
    def session_options(self) -> dict[str, str]:
        """Empty: models are timed as a session is by default."""
        return {}

    @property
    def environment(self) -> Environment:
        return processor.describe_environment()


def compare_latency(
    models: Sequence[tuple[str, Runnable]],
    feed: Feed,
    options: TimingOptions | None = None,
    on_round: Callable[[], None] | None = None,
) -> Comparison:
    """Time labelled models on one feed. Raises ModelError where one does not run."""
    options = options or TimingOptions()
    threads = options.threads or runtime.threads()
    timings = [Timing(label) for label, _ in models]
    for number in range(options.rounds):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for i in order:
            timings[i].rounds.append(_round(models[i][1], feed, options, threads))
            memory.release_memory()  # or the next model's weights come on top
        if on_round is not None:
            on_round()
    shapes = {name: list(v.shape) for name, v in feed.items()}
    return Comparison(timings, shapes, threads)


def _round(model: Runnable, feed: Feed, options: TimingOptions, threads: int) -> list[float]:
    """Milliseconds of each run of a fresh session, which is gone when this returns.

    Of a model whose first run takes longer than a round is to, one more is timed, and that is all.
    """
    slow = False
    if callable(model):
        call, wanted = model(threads), feed
    else:
        session = Session(model, SessionOptions(threads, provider=options.provider, exact=False))
        wanted = {name: feed[name] for name in session.inputs if name in feed}
        start = time.perf_counter()
        session.run(wanted)  # names what is missing, which the bare call would not
        slow = time.perf_counter() - start > max(options.seconds, _SLOW)
        call = session.call
    end = time.perf_counter() + options.seconds
    for _ in range(0 if slow else options.warmup):
        call(wanted)
        if time.perf_counter() > end:  # a run that takes so long is warm after one
            break
    times: list[float] = []
    least = 1 if slow else options.min_runs
    end = time.perf_counter() + options.seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call(wanted)
        times.append((time.perf_counter() - start) * 1e3)
    return times
