"""Compares models under load, as a server would run them: throughput, latencies, memory.

As without load (``latency.py``), one model is live at a time, models take turns in every round, and
ratios are taken within rounds. In a round all models get the same requests at the same times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.data.feeds import Feed
from qcompile.errors import DataError, ModelError
from qcompile.runtime import session as runtime
from qcompile.runtime.latency import Comparison, Timing, TimingOptions, median_and_interval
from qcompile.runtime.load_figures import ServerSetup, UnderLoad
from qcompile.runtime.request_load import Load, LoadRound, Plan, send
from qcompile.runtime.startup import (
    Served,
    Startup,
    open_streams,
    sessions_of,
    startup_in_new_process,
)
from qcompile.system import memory

MOST_FEEDS = 256  # of data that requests take turns through
SECONDS = 2.0  # for each model in each round, unless given
_WARM_UP = 0.25  # seconds under load before a round, at most
_FLOOR = 0.2  # seconds under load of a model that does nothing
_STARTS = 3  # processes per model that measure its start, at most one a round
_FLOOR_SHARE = 0.05  # of a latency, above which the load generator distorts it
_P99_RUNS = 1000  # of which ten are slower than p99


@dataclass
class _Seen:
    """All that was measured of one model."""

    label: str
    rounds: list[LoadRound] = field(default_factory=list)
    starts: list[Startup] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def start(
        self, model: Served, feeds: Sequence[Feed], load: Load, options: TimingOptions
    ) -> None:
        """Measure its start once more. It has run here, so if that fails only this is missing."""
        try:
            self.starts.append(startup_in_new_process(self.label, model, feeds, load, options))
        except ModelError as e:
            self.errors.append(str(e))

    def throughput(self) -> list[float]:
        return [r.runs_per_second for r in self.rounds]


def compare_under_load(
    models: Sequence[tuple[str, Served]],
    feeds: Sequence[Feed],
    load: Load,
    options: TimingOptions | None = None,
    on_round: Callable[[], None] | None = None,
) -> Comparison:
    """Load labelled models with requests that take turns through ``feeds``.

    ``options``: ``threads`` of each stream, 0 divides the cores between the streams; ``seconds`` of
    load for each model in each round. Raises ModelError where a model does not run, DataError where
    a round has too few requests.
    """
    options = options or TimingOptions(seconds=SECONDS)
    if not feeds:
        raise DataError("nothing to send: expected at least one feed")
    load.check_seconds(options.seconds)
    cores = runtime.threads()
    options = replace(options, threads=options.threads or max(1, cores // load.streams))
    seen = [_Seen(label) for label, _ in models]
    for number in range(options.rounds):
        plan = load.plan(number, options.seconds, len(feeds))
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for i in order:
            seen[i].rounds.append(_round(*models[i], feeds, load, plan, options))
            memory.release_memory()  # else the next model's weights come in addition
        if number < _STARTS:
            for (_, model), one in zip(models, seen, strict=True):
                one.start(model, feeds, load, options)
        if on_round is not None:
            on_round()
    return _comparison(seen, feeds, load, options, cores)


def _round(
    label: str,
    model: Served,
    feeds: Sequence[Feed],
    load: Load,
    plan: Plan,
    options: TimingOptions,
) -> LoadRound:
    """One model in new sessions, which are closed afterwards."""
    calls, feeds = open_streams(label, model, feeds, load, options)
    send(calls, feeds, Plan(min(plan.seconds, _WARM_UP), plan.order))
    return send(calls, feeds, plan)


def _floor_ms(feeds: Sequence[Feed], load: Load) -> float:
    """Milliseconds of a request with a model that does nothing: Python, locks, sleeping too long.

    Closed loop: the time between two runs of a stream, an upper bound of what a run waits for
    Python's lock. Open loop: the median latency, at 1000 requests per second at most.
    """
    rate = None if load.arrival is None else min(load.arrival, 1000.0)
    seconds = _FLOOR if rate is None else max(_FLOOR, 20 / rate)
    idle = replace(load, arrival=rate)
    plan = idle.plan(0, min(seconds, SECONDS), len(feeds))
    found = send([lambda feed: None] * load.streams, feeds, plan)
    if rate is None:
        return load.streams * 1e3 / found.runs_per_second
    return float(np.median(found.latencies)) if found.latencies else 0.0


def _figures(one: _Seen, reference: _Seen, load: Load) -> UnderLoad:
    rounds, starts = one.rounds, one.starts
    capacity = _median([r.capacity for r in rounds])
    figures = UnderLoad(
        p99_ms=Timing(one.label, [r.latencies for r in rounds]).p99,
        runs_per_second=_median(one.throughput()),
        samples_per_second=_median([r.samples_per_second for r in rounds]),
        capacity=capacity,
        queue_ms=_median([r.queue_ms for r in rounds]),
        waiting=max(r.waiting for r in rounds),
        unanswered=sum(r.unanswered for r in rounds),
        saturated=load.arrival is not None and load.arrival >= capacity,
    )
    if starts:
        resident = [s.resident for s in starts if s.resident is not None]
        peak = [s.peak for s in starts if s.peak is not None]
        figures = replace(
            figures,
            load_ms=_median([s.load for s in starts]) * 1e3,
            first_run_ms=_median([s.first_run for s in starts]) * 1e3,
            resident=int(_median(resident)) if resident else None,
            peak=int(_median(peak)) if peak else None,
        )
    if one is reference:
        return figures
    ratios = np.array(one.throughput()) / np.maximum(reference.throughput(), 1e-9)
    median, low, high = median_and_interval(ratios, load.seed)
    return replace(figures, ratio=median, ratio_low=low, ratio_high=high)


def _comparison(
    seen: Sequence[_Seen], feeds: Sequence[Feed], load: Load, options: TimingOptions, cores: int
) -> Comparison:
    bases = [s.base for one in seen for s in one.starts if s.base is not None]
    setup = ServerSetup(
        load.streams,
        sessions_of(load, options.threads),
        cores,
        load.arrival,
        options.seconds,
        load.seed,
        len(feeds),
        smallest=_shapes(feeds, min),
        floor_ms=_floor_ms(feeds, load),
        base=int(_median(bases)) if bases else None,
        notes=[],
    )
    timings = [
        Timing(one.label, [r.latencies for r in one.rounds], _figures(one, seen[0], load))
        for one in seen
    ]
    found = Comparison(
        timings,
        _shapes(feeds, max),
        options.threads,
        load.seed,
        server=setup,
        session_options=options.entries(one.label for one in seen),
    )
    failed = [one.errors[0] for one in seen if one.errors]
    found.server = replace(setup, notes=[*_notes(found, setup), *failed])
    return found


def _notes(found: Comparison, setup: ServerSetup) -> list[str]:
    """What a reader should know before comparing figures."""
    notes = []
    if setup.streams * found.threads > setup.cores:
        notes.append(
            f"{setup.streams} streams with {found.threads} threads each need more than the "
            f"{setup.cores} cores of this process: latencies include waiting for a core"
        )
    for i, timing in enumerate(found.timings):
        notes += _of_model(found, setup, i, timing)
    fastest = min(t.median for t in found.timings)
    if setup.floor_ms > _FLOOR_SHARE * fastest:
        notes.append(
            f"a request takes {setup.floor_ms:.3f} ms with a model that does nothing, over "
            f"{_FLOOR_SHARE:.0%} of the fastest median: compare models this small without load"
        )
    fewest = min(len(t.all) for t in found.timings)
    if fewest < _P99_RUNS:
        notes.append(
            f"p99 is of {fewest} runs of a model, or more: with under {_P99_RUNS} it varies from "
            "one measurement to the next (--seconds, --rounds)"
        )
    return notes


def _of_model(found: Comparison, setup: ServerSetup, index: int, timing: Timing) -> list[str]:
    """Saturated, or slower than the reference."""
    figures, reference = timing.server, found.timings[0]
    assert figures is not None
    if figures.saturated:
        given_up = f", {figures.unanswered} were never answered" if figures.unanswered else ""
        return [
            f"{timing.label} is saturated: {setup.arrival:g} requests arrive per second, it "
            f"answers {figures.runs_per_second:.4g}; at the end of a round up to {figures.waiting} "
            f"were waiting{given_up}. The queue grows, and latencies with --seconds"
        ]
    if index == 0:
        return []
    if setup.arrival is None and figures.ratio_high is not None and figures.ratio_high < 1:
        how = f"answers {figures.ratio:.2f} times as many requests as"
    elif setup.arrival is not None and found.ratio(index).low > 1:
        how = f"takes {found.ratio(index).median:.2f} times as long under this load as"
    else:
        return []
    return [f"{timing.label} is slower than the reference: it {how} {reference.label}"]


def _shapes(feeds: Sequence[Feed], pick: Callable[[tuple[int, ...]], int]) -> dict[str, list[int]]:
    """The sizes of each input that ``pick`` takes of all feeds: the largest or the smallest."""
    return {
        name: [pick(sizes) for sizes in zip(*(feed[name].shape for feed in feeds), strict=False)]
        for name in feeds[0]
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
