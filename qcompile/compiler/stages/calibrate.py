"""The stage between plan and transforms: from feeds, or a lock, to what calibration found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice

from qcompile.calibration import collector
from qcompile.calibration.calibration_file import Calibration
from qcompile.calibration.resume import ResumableCalibration
from qcompile.compiler.config.lockfile import environment
from qcompile.compiler.stages import lock_check
from qcompile.compiler.stages.job import Job
from qcompile.data.feed_digest import FeedDigest, of_feeds
from qcompile.data.feeds import Feed, HoldOut
from qcompile.errors import RecipeError
from qcompile.ir import printer
from qcompile.planning import Context
from qcompile.rewriting import Pass, Stage
from qcompile.runtime import session
from qcompile.runtime.spilled_arrays import KeptChannels
from qcompile.system.resume_cache import key_of


def calibrate(job: Job, ctx: Context, late: Sequence[Pass]) -> None:
    """Collect what the plan and later passes ask for; hold feeds back to verify with."""
    if not any(p.stage == Stage.INSERT for p in late):
        for use in [u for d in ctx.plan.quantized() for u in d.uses]:
            ctx.plan.release(use.node, "planned, but no pass of the pipeline inserts quantizers")
        ctx.requests.clear()
    if not ctx.requests:
        if job.feeds is not None:
            _check_memory(job)
            _hold_back(job)
        return
    locked = job.options.lock
    if locked is None or locked.is_light:
        watched = dict.fromkeys(tensor for p in late for tensor in p.wants(job.graph, ctx))
        found = _collected(job, ctx, list(watched))
    else:
        found = _locked(job, ctx, locked.read_calibration())
    _use(job, ctx, found)


def why_float(ctx: Context) -> str:
    """The commonest reason among the weights, for the note on a model that stayed float."""
    reasons = Counter(d.reason for d in ctx.plan.decisions if d.kind == "weight")
    reasons.update(s.reason for s in ctx.skips if s.pass_name == "plan-operands")
    if not reasons:
        return f"target {ctx.target.name!r} has no rule that fits this model"
    return reasons.most_common(1)[0][0]


def _use(job: Job, ctx: Context, found: Calibration) -> None:
    if job.options.keep_calibration:
        job.calibration = found.copy()
    known = ctx.ranges.found  # what the plan knows without data
    ctx.ranges, store = found.ranges, job.budget.store
    ctx.channels = found.channels if store is None else KeptChannels(store, found.channels)
    ctx.ranges.found |= known
    job.report.calibration = found.account


def _collected(job: Job, ctx: Context, watched: list[str]) -> Calibration:
    if job.feeds is None:
        raise RecipeError("the pipeline asks for calibrated ranges, but no data was given")
    if job.options.lock is not None and job.feeds.reusable:
        _hold_back(job)  # other data than was locked is told before the work
    _check_memory(job, _beside(job, watched))
    job.progress.step("calibrate")
    with job.timed("calibrate"):
        kept = _kept(job, ctx, watched)
        found = kept.finished({r.tensor for r in ctx.requests}) if kept is not None else None
        if found is None:
            found = _run(job, ctx, watched, kept)
    if job.lone_feed:
        job.report.notes.append("one batch of data only: it served to calibrate and to verify")
    return found


def _kept(job: Job, ctx: Context, watched: list[str]) -> ResumableCalibration | None:
    """The place of this calibration in the cache; None without one, or for one-pass data.

    All feeds are looked at for it, without the model.
    """
    cache = job.options.cache
    if cache is None or job.feeds is None or not job.feeds.reusable:
        return None
    _hold_back(job)
    threads = job.options.threads or session.threads()
    parts = [
        environment(), threads, job.model_digest, printer.structure(job.graph), job.data_digest,
        job.recipe.calibrator, job.recipe.mask_padding, job.options.max_memory,
        [repr(r) for r in ctx.requests], watched, of_feeds(_beside(job, watched)),
    ]  # fmt: skip
    return ResumableCalibration(cache, key_of(parts), job.report.notes)


def _beside(job: Job, watched: list[str]) -> Iterable[Feed]:
    """General text to run beside the data, where channels are watched."""
    return job.general_text if watched and job.general_text is not None else ()


def _run(
    job: Job, ctx: Context, watched: list[str], kept: ResumableCalibration | None
) -> Calibration:
    options = _options(job)
    calibrator = job.recipe.make_calibrator()

    def fresh() -> collector.Collector:
        requests = ctx.requests
        return collector.collector(job.graph, requests, calibrator, ctx.evaluate, options, watched)

    made = fresh() if kept is None else kept.resumed(fresh)

    def seen(_number: int) -> None:
        job.progress.advance()
        if kept is not None:
            kept.checkpoint(made)

    digest = FeedDigest()
    split = HoldOut(digest.passing(job.feeds or ()))
    ranges = collector.collect(made, islice(split.calibration(), made.feeds_seen, None), seen)
    _held_back(job, split, digest)
    beside = _beside(job, watched)
    for feed in beside:
        made.foresee(feed)
    account = {
        "calibrator": job.recipe.calibrator,
        "feeds": made.feeds_seen,
        "held_back": len(split.held_back),
        "tensors": len(ctx.requests),
        "general_text": bool(beside),
        "padding_left_out": options.mask and any(t.token_axis is not None for t in made.taps),
    }
    found = Calibration(ranges, made.channels(), account)
    if kept is not None:
        kept.finish(found)
    return found


def _options(job: Job) -> collector.CollectorOptions:
    budget = job.budget
    keep = None if budget.store is None else budget.store.array
    settings = job.recipe.mask_padding, job.options.threads
    return collector.CollectorOptions(budget.fetched, *settings, budget.parts, keep)


def _locked(job: Job, ctx: Context, found: Calibration | None) -> Calibration:
    """From the lock; data, where it is given all the same, serves to verify."""
    if found is None or not found.covers({r.tensor for r in ctx.requests}):
        changed = "; ".join(job.options.lock.changes()) if job.options.lock else ""
        raise RecipeError(
            "the lock's calibration does not fit the plan that this version makes"
            + (f": {changed}" if changed else "")
        )
    if job.feeds is not None:
        _check_memory(job)
        _hold_back(job)
    return found


def _check_memory(job: Job, beside: Iterable[Feed] = ()) -> None:
    """Raise DataError where some sample will not fit; data that is read once tells as it comes."""
    if job.budget.limit is not None and job.feeds is not None and job.feeds.reusable:
        job.budget.check(chain(job.feeds, beside))


def _hold_back(job: Job) -> None:
    """Modes that need no ranges use the data to verify with."""
    digest = FeedDigest()
    split = HoldOut(digest.passing(job.feeds or ()))
    for _ in split.calibration():
        pass
    _held_back(job, split, digest)


def _held_back(job: Job, split: HoldOut, digest: FeedDigest) -> None:
    job.held_back = [part for feed in split.held_back for part in job.budget.parts(feed)]
    job.data_digest = digest.hexdigest()
    job.lone_feed = split.reused
    lock_check.check_data(job)
