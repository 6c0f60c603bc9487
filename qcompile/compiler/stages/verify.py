"""The gates at the end: the compiled bytes in a fresh session, against the float model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.job import Job
from qcompile.data.feeds import Feed
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import DataError, ModelError
from qcompile.quant import Array
from qcompile.runtime import latency
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.evaluation.batch_invariance import Invariance, invariance
from qcompile.runtime.evaluation.closeness import Verdict
from qcompile.runtime.evaluation.float16_emulation import rounding_form
from qcompile.runtime.evaluation.user_metric import measure
from qcompile.runtime.memory_budget import LIBRARIES
from qcompile.runtime.profiler import profile
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.memory import release_memory

RANDOM = "not verified: the float model's own answers differ from run to run"
_SYNTHETIC_FEEDS = 4
_PROFILED_MS, _FEWEST_RUNS, _MOST_RUNS = 3000, 3, 30  # of each model, by its median latency


def verify(job: Job, compiled: Path) -> list[Feed]:
    """Compare the compiled model with the float one; failures and notes go into the report.

    Returns the feeds, for ``bench``. Raises ModelError where ONNX Runtime cannot load or run what
    was compiled.
    """
    job.report.operators = dict(_operators(job, compiled))
    release_memory()
    with job.timed("saturation"):
        sums = saturation_check.Sums(compiled, job.recipe.isa)
    feeds: list[Feed] = []
    if job.options.verify or job.options.bench:
        feeds = _feeds(job)
    elif job.options.lock is None:
        job.report.notes.append("not verified and not timed, as asked")
    if feeds and job.options.verify:
        _verify(job, compiled, feeds, sums)
    elif feeds:
        job.report.notes.append("not verified (--no-verify)")
    with job.timed("saturation"):
        looked = feeds[0] if feeds and job.options.verify else None
        verdict, threads = job.report.verdict, job.options.threads
        job.report.saturation = saturation_check.account(sums, looked, verdict, threads)
    if job.report.saturation["advice"]:
        job.report.notes.append(job.report.saturation["advice"])
    return feeds


def _operators(job: Job, compiled: Path) -> Counter[str]:
    """What the target's provider runs; what was written where that provider is missing."""
    if not job.is_away:
        return runtime.optimized_ops(compiled, job.provider)
    Session(compiled, _options(job))  # says what is wrong with a model
    job.report.away = job.provider
    job.report.notes.append(
        f"{job.target.provider} is not installed here: answers are those of the graph as written, "
        f"float16 rounded where it is stored, run by {job.provider}"
    )
    return runtime.written_ops(compiled.read_bytes())


def _options(job: Job, *, compiled: bool = True) -> SessionOptions:
    """How a model runs for its answers: away from its provider as written, for no fusion of
    another provider to change them."""
    as_written = compiled and job.is_away
    return SessionOptions(job.options.threads, optimize=not as_written, provider=job.provider)


def bench(job: Job, compiled: Path, feeds: list[Feed]) -> None:
    """Time the compiled model beside the float one, on the largest of the feeds."""
    if not feeds:
        return
    if job.options.bench:
        _time(job, compiled, largest(feeds))
    else:
        job.report.notes.append("not timed (--no-bench)")


def largest(feeds: list[Feed]) -> Feed:
    """The feed to time with."""
    return max(feeds, key=lambda f: max(v.size for v in f.values()))


def _feeds(job: Job) -> list[Feed]:
    """Held-back feeds; without data, made-up ones, which the report says.

    Raises DataError where those are over the memory budget.
    """
    if job.held_back:
        return job.held_back
    try:
        feeds = synthetic_feeds(job.graph, {}, _SYNTHETIC_FEEDS, job.recipe.seed)
    except (DataError, ModelError) as e:
        return _none(job, e)
    job.budget.check(feeds)
    try:
        Session(job.running).run(feeds[0])  # a float model that fails says nothing of ours
    except (DataError, ModelError) as e:
        return _none(job, e)
    job.report.notes.append("verified on made-up inputs: give --data for a verdict that counts")
    return feeds


def _none(job: Job, why: Exception) -> list[Feed]:
    job.report.notes.append(f"not verified, give --data: made-up inputs do not do: {why}")
    return []


def _verify(job: Job, compiled: Path, feeds: list[Feed], sums: saturation_check.Sums) -> None:
    job.progress.step("verify", (1 + len(sums.kinds)) * len(feeds))
    with job.timed("verify"):
        # One session at a time: the float model's outputs are kept, then the compiled one runs.
        reference = Session(job.running, _options(job, compiled=False))
        old = list(_outputs(job, reference, feeds))
        del reference
        release_memory()  # or the next session's weights come on top of this one's
        try:
            verdict = saturation_check.judged(
                sums, lambda kind: _judged(job, sums, feeds, old, kind)
            )
        except DataError as e:
            if job.held_back and job.quantized:
                raise DataError(f"{e} (--no-verify compiles without comparing)") from e
            job.report.notes.append(f"not verified: {e}")
            return
    if verdict.failures and not _repeats(job, old, feeds):
        job.report.notes.append(RANDOM)
        return
    job.report.verdict = verdict
    job.report.notes += saturation_check.unemulated(verdict)
    note = Invariance(verdict.alone, verdict.padded).note
    job.report.notes += [] if note is None else [note]
    job.report.failures += verdict.failures


def _judged(
    job: Job, sums: saturation_check.Sums, feeds: list[Feed], old: list[dict[str, Array]], kind: str
) -> Verdict:
    """The compiled model by one kind of sums, against outputs of the float model."""
    runner = _runner(job, sums, kind)
    new = _outputs(job, runner, feeds)
    if job.options.metric is not None:
        new = iter(kept := list(new))
    verdict = closeness.judge(zip(old, new, feeds, strict=True), job.report.gates)
    if job.options.metric is not None:
        was, now = (measure(job.options.metric, feeds, made) for made in (old, kept))
        verdict.measured(was, now, job.report.gates)
    return invariance(runner.run, feeds).on(runner.on(verdict))


def _runner(job: Job, sums: saturation_check.Sums, kind: str) -> saturation_check.Runner:
    """The compiled model in a session with one kind of sums."""
    if not job.is_away:
        return sums.runner(kind, _options(job))
    assert isinstance(sums.model, Path)
    options = _options(job)
    return saturation_check.Runner(
        Session(rounding_form(sums.model.read_bytes()), options), options.entries
    )


def _repeats(job: Job, old: list[dict[str, Array]], feeds: list[Feed]) -> bool:
    """False where the float model misses the gates beside itself: it draws random numbers.

    Fresh sessions start with the same seed, so one runs everything twice. Equal answers repeat,
    whatever the gates: some cannot be reached at all. Where nothing was quantized nothing less than
    equal will do, of ``old`` too: some operators answer by what their memory held before.
    """
    session = Session(job.running, _options(job, compiled=False))
    first, second = ([session.run(feed) for feed in feeds] for _ in range(2))
    if _equal(first, second) and (job.quantized or _equal(old, first)):
        return True
    made = zip(first, second, feeds, strict=True)
    return job.quantized and closeness.judge(made, job.report.gates).passed


def _equal(first: list[dict[str, Array]], second: list[dict[str, Array]]) -> bool:
    """True where all arrays are the same, NaN and all; sequences, maps and text say no."""
    pairs = zip(first, second, strict=True)
    return all(
        isinstance(x, np.ndarray) and x.dtype != object and x.tobytes() == b[name].tobytes()
        for a, b in pairs
        for name, x in a.items()
    )


def _outputs(
    job: Job, session: Session | saturation_check.Runner, feeds: list[Feed]
) -> Iterator[dict[str, Array]]:
    for feed in feeds:
        yield job.budget.kept(session.run(feed))
        job.progress.advance()


def _time(job: Job, compiled: Path, feed: Feed) -> None:
    options = latency.TimingOptions(
        threads=job.options.threads,
        rounds=job.options.bench_rounds,
        provider=job.provider,
    )
    job.progress.step("bench", options.rounds)
    with job.timed("bench"):
        try:
            speed = latency.compare_latency(
                [("float", job.running), ("compiled", compiled)],
                feed,
                options,
                job.progress.advance,
            )
        except ModelError as e:
            raise ModelError(f"timing failed: {e}") from e
    job.report.speed = speed
    _judge_speed(job)
    if job.options.profile:
        _profile(job, compiled, feed, max(t.median for t in speed.timings))


def _profile(job: Job, compiled: Path, feed: Feed, slowest: float) -> None:
    """Where the time of both goes, by operator; as many runs as take a few seconds."""
    runs = min(max(int(_PROFILED_MS / slowest), _FEWEST_RUNS), _MOST_RUNS)
    job.progress.step("profile")
    with job.timed("profile"):
        models = [("float", job.running), ("compiled", compiled)]
        job.report.profile = profile(models, feed, job.options.threads, runs, job.provider)


def _judge_speed(job: Job) -> None:
    speed, limit = job.report.speed, job.report.gates.max_latency_ratio
    if speed is None:
        return
    if speed.noisy:
        job.report.notes.append("the machine was noisy while timing: rounds differ by over 25 %")
    if job.is_away:
        job.report.notes.append(
            f"latency was measured on {job.provider}, not on the target's {job.target.provider}: "
            "it says nothing about the target, and is no gate"
        )
        return
    if limit is None:
        return
    ratio = speed.ratio(1)
    if ratio.low > limit and not job.target.gate_latency:
        job.report.notes.append(
            f"slower than float here ({ratio.median:.2f} times): target {job.target.name!r} is "
            "portable, not fast, and its latency is no gate"
        )
        return
    if ratio.low > limit:  # the whole interval: slower, and not by chance
        job.report.failures.append(
            f"compiled takes {ratio.median:.2f} times as long as float "
            f"(interval {ratio.low:.2f} to {ratio.high:.2f}), over {limit:g} (--max-latency-ratio)"
        )


def over_budget(job: Job) -> list[str]:
    """A note where a stage took more than the budget and the libraries: it was foreseen wrong."""
    limit, seen = job.budget.limit, job.report.memory
    stage = next((n for n, m in seen.items() if limit and m > limit + LIBRARIES), None)
    if stage is None:
        return []
    return [
        f"{stage} took {seen[stage]} bytes of memory, over --max-memory {limit} and the "
        f"{LIBRARIES} of the libraries"
    ]
