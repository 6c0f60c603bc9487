"""The stage between plan and transforms: from feeds, or a lock, to what calibration found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from qcompile.calibration import collector
from qcompile.calibration.calibration_file import Calibration, CalibrationAccount
from qcompile.calibration.resume import ResumableCalibration
from qcompile.compiler.config.lockfile import environment
from qcompile.compiler.report.notes import Note
from qcompile.compiler.stages import lock_check
from qcompile.compiler.stages.pipelines import Pipeline
from qcompile.compiler.stages.prepare import Prepared
from qcompile.data.feed_digest import FeedDigest, digest_feeds
from qcompile.data.feeds import Feed, HoldOut
from qcompile.errors import RecipeError
from qcompile.ir import printer
from qcompile.planning import Context
from qcompile.rewriting import Stage
from qcompile.runtime import session
from qcompile.runtime.spilled_arrays import KeptChannels
from qcompile.system.resume_cache import key_of

_LONE = "one batch of data only: it served to calibrate and to verify"


@dataclass(frozen=True)
class HeldOut:
    """feeds: to verify with, not calibrated on. digest: SHA-256 of all data, None without data.
    lone: there is one feed only, for both."""

    feeds: list[Feed] = field(default_factory=list)
    digest: str | None = None
    lone: bool = False


@dataclass(frozen=True)
class Calibrated:
    """account: what the report says of it, None in modes without ranges. calibration: all that was
    found, None where the options do not ask to keep it."""

    held_out: HeldOut
    account: CalibrationAccount | None = None
    calibration: Calibration | None = None
    notes: tuple[Note, ...] = ()


def calibrate(prepared: Prepared, ctx: Context, pipeline: Pipeline) -> Calibrated:
    """Collect what the plan and later passes ask for, into ``ctx``; hold feeds out to verify with.

    Raises RecipeError where a lock does not fit, or ranges are asked for without data.
    """
    if not any(p.stage is Stage.INSERT for p in pipeline.passes):
        for use in [u for d in ctx.plan.quantized() for u in d.uses]:
            ctx.plan.release(use.node, "planned, but no pass of the pipeline inserts quantizers")
        ctx.requests.clear()
    locked = prepared.options.lock
    if not ctx.requests:
        return Calibrated(_checked_and_held_out(prepared))
    if locked is not None and not locked.is_light:
        found = _locked(prepared, ctx, locked.read_calibration())
        return _used(prepared, ctx, found, _checked_and_held_out(prepared))
    late = pipeline.after_calibration
    watched = dict.fromkeys(tensor for p in late for tensor in p.wants(prepared.graph, ctx))
    return _collected(prepared, ctx, list(watched))


def _used(
    prepared: Prepared,
    ctx: Context,
    found: Calibration,
    held_out: HeldOut,
    notes: Sequence[Note] = (),
) -> Calibrated:
    """Enter ranges and channels into ``ctx``; what the plan knows without data stands."""
    keep, store = prepared.options.keep_calibration, prepared.budget.store
    kept = found.copy() if keep else None
    known = ctx.ranges.found
    ctx.ranges = found.ranges
    ctx.ranges.found |= known
    ctx.channels = found.channels if store is None else KeptChannels(store, found.channels)
    return Calibrated(held_out, found.account, kept, tuple(notes))


def _collected(prepared: Prepared, ctx: Context, watched: list[str]) -> Calibrated:
    feeds = prepared.feeds
    if feeds is None:
        raise RecipeError("the pipeline asks for calibrated ranges, but no data was given")
    if prepared.options.lock is not None and feeds.reusable:
        _held_out(prepared)  # other data than was locked is refused before the work
    _check_memory(prepared, _general_text(prepared, watched))
    prepared.progress.step("calibrate")
    with prepared.stopwatch.stage("calibrate"):
        kept, held_out = _kept(prepared, ctx, watched)
        found = kept.finished({r.tensor for r in ctx.requests}) if kept is not None else None
        if found is None:
            found, held_out = _run(prepared, ctx, watched, kept)
    notes = [] if kept is None else [Note("calibration-resumed", text) for text in kept.notes]
    notes += [Note("one-batch", _LONE)] if held_out.lone else []
    return _used(prepared, ctx, found, held_out, notes)


def _kept(
    prepared: Prepared, ctx: Context, watched: list[str]
) -> tuple[ResumableCalibration | None, HeldOut]:
    """The place of this calibration in the cache; None without one, or for one-pass data.

    All feeds are looked at for it, without the model.
    """
    cache, graph, recipe = prepared.options.cache, prepared.graph, prepared.recipe
    if cache is None or prepared.reusable_feeds is None:
        return None, HeldOut()
    held_out = _held_out(prepared)
    threads = prepared.options.threads or session.threads()
    parts = [
        environment(), threads, prepared.float_model.digest, printer.structure(graph),
        held_out.digest, recipe.calibrator, recipe.mask_padding, prepared.options.max_memory,
        [repr(r) for r in ctx.requests], watched, digest_feeds(_general_text(prepared, watched)),
    ]  # fmt: skip
    return ResumableCalibration(cache, key_of(parts)), held_out


def _general_text(prepared: Prepared, watched: list[str]) -> Iterable[Feed]:
    """To run in addition to the data, where channels are watched."""
    text = prepared.general_text
    return text if watched and text is not None else ()


def _run(
    prepared: Prepared, ctx: Context, watched: list[str], kept: ResumableCalibration | None
) -> tuple[Calibration, HeldOut]:
    options, graph = _options(prepared), prepared.graph
    calibrator = prepared.recipe.make_calibrator()

    def fresh() -> collector.Collector:
        requests = ctx.requests
        return collector.collector(graph, requests, calibrator, ctx.evaluate, options, watched)

    made = fresh() if kept is None else kept.resumed(fresh)

    def seen(_number: int) -> None:
        prepared.progress.advance()
        if kept is not None:
            kept.checkpoint(made)

    digest = FeedDigest()
    split = HoldOut(digest.passing(prepared.feeds or ()))
    ranges = collector.collect(made, islice(split.calibration(), made.feeds_seen, None), seen)
    held_out = _checked(prepared, split, digest)
    text = _general_text(prepared, watched)
    for feed in text:
        made.update_background(feed)
    account = CalibrationAccount(
        calibrator=prepared.recipe.calibrator,
        feeds=made.feeds_seen,
        held_out=len(split.held_out),
        tensors=len(ctx.requests),
        general_text=bool(text),
        padding_left_out=options.mask and any(t.token_axis is not None for t in made.taps),
    )
    found = Calibration(ranges, made.channels(), account)
    if kept is not None:
        kept.finish(found)
    return found, held_out


def _options(prepared: Prepared) -> collector.CollectorOptions:
    budget = prepared.budget
    keep = None if budget.store is None else budget.store.array
    settings = prepared.recipe.mask_padding, prepared.options.threads
    return collector.CollectorOptions(budget.fetched, *settings, budget.parts, keep)


def _locked(prepared: Prepared, ctx: Context, found: Calibration | None) -> Calibration:
    if found is None or not found.covers({r.tensor for r in ctx.requests}):
        lock = prepared.options.lock
        changed = "; ".join(lock.changes()) if lock else ""
        raise RecipeError(
            "the lock's calibration does not fit the plan that this version makes"
            + (f": {changed}" if changed else "")
        )
    return found


def _check_memory(prepared: Prepared, text: Iterable[Feed] = ()) -> None:
    """Raise DataError where some sample will not fit; of one-pass data, each as it comes."""
    feeds = prepared.reusable_feeds
    if prepared.budget.limit is not None and feeds is not None:
        prepared.budget.check(chain(feeds, text))


def _checked_and_held_out(prepared: Prepared) -> HeldOut:
    """Where nothing is calibrated, data serves to verify."""
    if prepared.feeds is None:
        return HeldOut()
    _check_memory(prepared)
    return _held_out(prepared)


def _held_out(prepared: Prepared) -> HeldOut:
    """Read all data without running it."""
    digest = FeedDigest()
    split = HoldOut(digest.passing(prepared.feeds or ()))
    for _ in split.calibration():
        pass
    return _checked(prepared, split, digest)


def _checked(prepared: Prepared, split: HoldOut, digest: FeedDigest) -> HeldOut:
    """What was held out. Raises RecipeError where a lock was made with other data."""
    feeds = [part for feed in split.held_out for part in prepared.budget.parts(feed)]
    found = HeldOut(feeds, digest.hexdigest(), split.reused)
    lock_check.check_data(prepared.options.lock, found.digest, prepared.general_text)
    return found
