"""The gate on speed: the compiled model timed against the float one, in alternating rounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qcompile.compiler.report.notes import Note
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.prepare import Prepared
from qcompile.compiler.stages.verify import Verified
from qcompile.data.feeds import Feed
from qcompile.errors import ModelError
from qcompile.runtime import latency
from qcompile.runtime.latency import Comparison, TimingOptions
from qcompile.runtime.profiler import Profile, profile

_PROFILED_MS, _FEWEST_RUNS, _MOST_RUNS = 3000, 3, 30  # per model; runs follow from its median
Models = list[tuple[str, bytes | Path]]


@dataclass(frozen=True)
class Timed:
    """speed: None if nothing was timed. profile: of float and compiled, if asked for."""

    speed: Comparison | None = None
    profile: tuple[Profile, ...] = ()
    notes: tuple[Note, ...] = ()
    failures: tuple[str, ...] = ()


def bench(verified: Verified) -> Timed:
    """Time both models on the largest of the feeds. Raises ModelError where a model fails."""
    prepared, feeds = verified.prepared, verified.feeds
    if not feeds:
        return Timed()
    if not prepared.options.bench:
        return Timed(notes=(Note("not-timed", "not timed (--no-bench)"),))
    models = _models(verified)
    feed = largest_feed(feeds)
    options = _options(prepared, models)
    speed = _speed(prepared, models, feed, options)
    profiles = _profiles(prepared, models, feed, speed, options) if prepared.options.profile else []
    notes, failures = _judged(prepared, speed)
    notes += [Note("session-options", text) for text in speed.session_notes]
    return Timed(speed, tuple(profiles), tuple(notes), tuple(failures))


def latency_ratio(verified: Verified) -> float | None:
    """Compiled over float, the median over rounds; None where nothing is to be timed."""
    prepared, feeds = verified.prepared, verified.feeds
    if not feeds or not prepared.options.bench:
        return None
    models = _models(verified)
    speed = _speed(prepared, models, largest_feed(feeds), _options(prepared, models))
    return speed.ratio(1).median


def _models(verified: Verified) -> Models:
    return [
        ("float", verified.prepared.float_model.running),
        ("compiled", verified.rewritten.compiled.path),
    ]


def largest_feed(feeds: list[Feed]) -> Feed:
    """The feed with the largest array, to time with."""
    return max(feeds, key=lambda f: max(v.size for v in f.values()))


def _options(prepared: Prepared, models: Models) -> TimingOptions:
    return TimingOptions(
        threads=prepared.options.threads,
        rounds=prepared.options.bench_rounds,
        provider=prepared.provider,
        exact=saturation_check.saturating_here(models, prepared.provider),
    )


def _speed(prepared: Prepared, models: Models, feed: Feed, options: TimingOptions) -> Comparison:
    prepared.progress.step("bench", options.rounds)
    with prepared.stopwatch.stage("bench"):
        try:
            return latency.compare_latency(models, feed, options, prepared.progress.advance)
        except ModelError as e:
            raise ModelError(f"timing failed: {e}") from e


def _profiles(
    prepared: Prepared, models: Models, feed: Feed, speed: Comparison, options: TimingOptions
) -> list[Profile]:
    """The time of both models by operator; as many runs as take a few seconds."""
    slowest = max(t.median for t in speed.timings)
    runs = min(max(int(_PROFILED_MS / slowest), _FEWEST_RUNS), _MOST_RUNS)
    prepared.progress.step("profile")
    with prepared.stopwatch.stage("profile"):
        return profile(models, feed, options.threads, runs, options.provider, options.exact)


def _judged(prepared: Prepared, speed: Comparison) -> tuple[list[Note], list[str]]:
    """Notes and failures."""
    target, limit, ratio = prepared.target, prepared.gates.max_latency_ratio, speed.ratio(1)
    noisy = Note("noisy", "the machine was noisy while timing: rounds differ by more than 25 %")
    notes = [noisy] if speed.noisy else []
    if prepared.provider_missing:
        text = (
            f"latency was measured on {prepared.provider}, not on the target's {target.provider}: "
            "it does not predict the target's, and is not gated"
        )
        return [*notes, Note("provider-missing", text)], []
    if limit is None or ratio.low <= limit:
        return notes, []
    if not target.gate_latency:
        text = (
            f"slower than float here ({ratio.median:.2f} times): target {target.name!r} is "
            "portable, not fast, and its latency is not gated"
        )
        return [*notes, Note("slower", text)], []
    # The whole interval is above the limit: slower, and not by chance.
    failure = (
        f"compiled takes {ratio.median:.2f} times as long as float "
        f"(interval {ratio.low:.2f} to {ratio.high:.2f}), over {limit:g} (--max-latency-ratio)"
    )
    return notes, [failure]
