"""Compares latencies of models: in rounds, one session at a time, by ratios within a round.

Two sessions at once would disturb each other (spinning threads), and the speed of a shared machine
drifts. So each round loads, warms up and times the models one after the other, and models are
compared by the ratio of their times in the same round. The interval is a bootstrap over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from qcompile.quant import Array
from qcompile.runtime import kernels
from qcompile.runtime import session as runtime
from qcompile.runtime.load_figures import ServerSetup, UnderLoad
from qcompile.runtime.notebook_table import html_table
from qcompile.runtime.profiler import Profile
from qcompile.runtime.session import Feed, Session, SessionOptions
from qcompile.system import memory
from qcompile.system.json_values import Record, members
from qcompile.system.processor import Environment

_NOISY = 1.25  # largest over smallest round median, above which the machine counts as noisy
FEWEST_ROUNDS = 4  # with fewer, a bootstrap over rounds is meaningless
_RESAMPLES = 2000
_SLOW = 0.4  # seconds: a shorter run is cheap to repeat
_LEVEL = (2.5, 97.5)  # percentiles of the confidence interval


# A model for ONNX Runtime, or a function that returns, for a number of threads, one to run a feed.
Runnable = bytes | Path | Callable[[int], Callable[[Feed], Any]]


@dataclass(frozen=True)
class TimingOptions:
    """``seconds``: timed per model and round, with at least ``min_runs`` runs (1 of slow models).

    Before that, the model is warmed up for as many seconds or ``warmup`` runs, whichever is less.
    ``exact``: labels of models in whose sessions int8 sums are exact also on x86 without VNNI.
    """

    threads: int = 0
    rounds: int = 6
    seconds: float = 0.4
    min_runs: int = 3
    warmup: int = 5
    provider: str = "CPUExecutionProvider"
    exact: frozenset[str] = frozenset()

    def session(self, label: str, threads: int) -> SessionOptions:
        """How a model's session is opened."""
        return SessionOptions(threads, provider=self.provider, exact=label in self.exact)

    def entries(self, labels: Iterable[str]) -> dict[str, dict[str, str]]:
        """ONNX Runtime's options by model, of those whose session is not a default one."""
        found = {label: self.session(label, self.threads).entries for label in labels}
        return {label: entries for label, entries in found.items() if entries}


@dataclass
class Timing:
    """Latencies of one model in milliseconds, one list per round."""

    label: str
    rounds: list[list[float]] = field(default_factory=list)
    server: UnderLoad | None = None

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
    def p99(self) -> float:
        return float(np.percentile(self.all, 99))

    @property
    def medians(self) -> list[float]:
        """The median of each round."""
        return [float(np.median(r)) for r in self.rounds]

    @property
    def noisy(self) -> bool:
        return max(self.medians) / min(self.medians) > _NOISY


@dataclass(frozen=True)
class Ratio:
    """Candidate over reference time: the median ratio of rounds with its interval, and that of the
    best times."""

    median: float
    low: float
    high: float
    best: float


@dataclass(frozen=True)
class TimedModel(Record):
    """Latencies of one model, and their ratios to the reference unless it is the reference."""

    model: str
    best_ms: float
    median_ms: float
    p90_ms: float
    runs: int
    ratio: Annotated[float | None, "the median of the rounds' ratios; not of the reference"] = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_best: float | None = None
    server: UnderLoad | None = None

    JSON = members(
        "model best_ms median_ms p90_ms runs ratio? ratio_low? ratio_high? ratio_best? server?"
    )


@dataclass
class Comparison(Record):
    """Timings of all models for one set of input shapes; the first is the reference."""

    timings: list[Timing]
    shapes: dict[str, list[int]]
    threads: int
    seed: int = 0
    profile: list[Profile] | None = None
    server: ServerSetup | None = None
    session_options: Annotated[
        dict[str, dict[str, str]], "of ONNX Runtime, by model; those without any are default"
    ] = field(default_factory=dict)

    JSON = members(
        "shapes threads rounds noisy session_options models **environment profile? server?"
    )

    def ratio(self, index: int) -> Ratio:
        """Model ``index`` over the reference."""
        reference, candidate = self.timings[0], self.timings[index]
        ratios = np.array(candidate.medians) / np.array(reference.medians)
        best = candidate.best / reference.best
        return Ratio(*median_and_interval(ratios, self.seed), best)

    @property
    def noisy(self) -> bool:
        return any(t.noisy for t in self.timings)

    @property
    def models(self) -> list[TimedModel]:
        """One row per model, in the given order."""
        rows = []
        for i, t in enumerate(self.timings):
            row = TimedModel(t.label, t.best, t.median, t.p90, len(t.all), server=t.server)
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

    def __repr__(self) -> str:
        shown = [f"{m.model} {m.median_ms:.2f} ms{_faster(m)}" for m in self.models]
        return f"<Comparison {', '.join(shown)}>"

    def _repr_html_(self) -> str:
        """One row per model, for notebooks."""
        columns = "model", "best ms", "median", "p90", "speed-up (median)"
        rows = [
            (m.model, f"{m.best_ms:.2f}", f"{m.median_ms:.2f}", f"{m.p90_ms:.2f}",
             f"{1 / m.ratio:.2f}" if m.ratio else "1.00")
            for m in self.models
        ]  # fmt: skip
        where = ", ".join(f"{name} {sizes}" for name, sizes in self.shapes.items())
        return html_table(f"{where}; threads: {self.threads}", columns, rows, self.session_notes)

    @property
    def rounds(self) -> int:
        return len(self.timings[0].rounds)

    @property
    def session_notes(self) -> list[str]:
        """A sentence for each model that is not timed in a default session."""
        return [
            f"{label} was timed in a session with "
            + ", ".join(f"{key}={value}" for key, value in entries.items())
            + ", without which its int8 sums can saturate on this processor; qcompile.session "
            "opens the same"
            for label, entries in self.session_options.items()
        ]

    @property
    def environment(self) -> Environment:
        return kernels.environment()


def _faster(model: TimedModel) -> str:
    return f" ({1 / model.ratio:.2f}x)" if model.ratio else ""


def median_and_interval(ratios: Array, seed: int) -> tuple[float, float, float]:
    """The median of the rounds' ratios, and its interval: medians of rounds drawn with replacement.

    Bootstrap percentile interval: Efron 1979.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), _LEVEL)
    return float(np.median(ratios)), float(low), float(high)


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
    sessions = [options.session(label, threads) for label, _ in models]
    for number in range(options.rounds):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for i in order:
            timings[i].rounds.append(_round(models[i][1], feed, options, sessions[i]))
            memory.release_memory()  # else the next model's weights come in addition
        if on_round is not None:
            on_round()
    shapes = {name: list(v.shape) for name, v in feed.items()}
    entries = options.entries(label for label, _ in models)
    return Comparison(timings, shapes, threads, session_options=entries)


def _round(
    model: Runnable, feed: Feed, options: TimingOptions, session_options: SessionOptions
) -> list[float]:
    """Milliseconds of each run of a new session, which is closed afterwards.

    If the first run takes longer than a round should, only one more run is made, and timed.
    """
    slow = False
    if callable(model):
        call, inputs = model(session_options.threads), feed
    else:
        session = Session(model, session_options)
        inputs = {name: feed[name] for name in session.inputs if name in feed}
        start = time.perf_counter()
        session.run(inputs)  # reports missing inputs, unlike ``call``
        slow = time.perf_counter() - start > max(options.seconds, _SLOW)
        call = session.call
    end = time.perf_counter() + options.seconds
    for _ in range(0 if slow else options.warmup):
        call(inputs)
        if time.perf_counter() > end:  # one run that takes so long is enough
            break
    times: list[float] = []
    min_runs = 1 if slow else options.min_runs
    end = time.perf_counter() + options.seconds
    while len(times) < min_runs or time.perf_counter() < end:
        start = time.perf_counter()
        call(inputs)
        times.append((time.perf_counter() - start) * 1e3)
    return times
