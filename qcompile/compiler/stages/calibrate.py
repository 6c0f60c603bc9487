"""The stage between plan and transforms: ranges and channels, from feeds or from a lock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from qcompile.calibration import collector
from qcompile.calibration.calibration_file import Calibration, CalibrationAccount
from qcompile.calibration.resume import ResumableCalibration
from qcompile.calibration.shards import DataSize, shards
from qcompile.compiler.cluster.calibration_task import CalibrationTask
from qcompile.compiler.cluster.workers import LOCAL
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
from qcompile.rewriting import Pass, Stage
from qcompile.rewriting.bodies import NOT_INSERTED
from qcompile.runtime import session
from qcompile.runtime.spilled_arrays import KeptChannels
from qcompile.system.resume_cache import key_of

_UNEVEN = (
    "calibration ran twice: parts of the data differ so much that shards left out rows that belong "
    "into samples of channels; data in random order is calibrated once"
)
_ONE_BATCH = "only one batch of data: it is used both to calibrate and to verify"


@dataclass(frozen=True)
class HeldOut:
    """feeds: to verify with, not calibrated on. digest: SHA-256 of all data, None without data.
    single: there is only one feed, which is used for both. size: of the data to calibrate with,
    where it was read without running it."""

    feeds: list[Feed] = field(default_factory=list)
    digest: str | None = None
    single: bool = False
    size: DataSize | None = None


@dataclass(frozen=True)
class Calibrated:
    """account: for the report, None in modes without ranges. calibration: all ranges and channels,
    None unless the options ask to keep them."""

    held_out: HeldOut
    account: CalibrationAccount | None = None
    calibration: Calibration | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Watched:
    """Tensors whose channels passes ask for, and those of them whose second moments too."""

    channels: list[str]
    moments: list[str]


def calibrate(prepared: Prepared, ctx: Context, pipeline: Pipeline) -> Calibrated:
    """Collect the ranges and channels that passes ask for into ``ctx``; hold feeds out to verify.

    Raises RecipeError where a lock does not fit, or ranges are asked for without data.
    """
    if not any(p.stage is Stage.INSERT for p in pipeline.passes):
        ctx.release_all(NOT_INSERTED)
    watched = _watched(prepared, ctx, pipeline.after_calibration)
    if not ctx.requests and not (watched.moments and _can_observe(prepared)):
        return Calibrated(_checked_and_held_out(prepared))
    locked = prepared.options.lock
    if locked is not None and not locked.is_light:
        calibration = _checked_calibration(prepared, ctx, locked.read_calibration())
        return _apply(prepared, ctx, calibration, _checked_and_held_out(prepared))
    return _collected(prepared, ctx, watched)


def _watched(prepared: Prepared, ctx: Context, passes: Iterable[Pass]) -> Watched:
    graph, late = prepared.graph, list(passes)
    moments = [tensor for p in late for tensor in p.wants_moments(graph, ctx)]
    channels = [tensor for p in late for tensor in p.wants(graph, ctx)]
    return Watched([*dict.fromkeys([*channels, *moments])], [*dict.fromkeys(moments)])


def _can_observe(prepared: Prepared) -> bool:
    """True where there is data, or a lock made with it: modes without ranges need neither."""
    locked = prepared.options.lock
    if locked is not None and not locked.is_light:
        return locked.calibration is not None
    return prepared.feeds is not None


def _apply(
    prepared: Prepared,
    ctx: Context,
    calibration: Calibration,
    held_out: HeldOut,
    notes: Sequence[Note] = (),
) -> Calibrated:
    """Enter ranges and channels into ``ctx``; ranges that the plan set without data stay."""
    keep, store = prepared.options.keep_calibration, prepared.budget.store
    kept = calibration.copy() if keep else None
    planned = ctx.ranges.found
    ctx.ranges = calibration.ranges
    ctx.ranges.found |= planned
    channels = calibration.channels
    ctx.channels = channels if store is None else KeptChannels(store, channels)
    return Calibrated(held_out, calibration.account, kept, tuple(notes))


def _collected(prepared: Prepared, ctx: Context, watched: Watched) -> Calibrated:
    feeds = prepared.feeds
    if feeds is None:
        raise RecipeError("the pipeline asks for calibrated ranges, but no data was given")
    if prepared.options.lock is not None and feeds.reusable:
        _held_out(prepared)  # refuses data that was not locked, before the work
    _check_memory(prepared, _general_text(prepared, watched))
    prepared.progress.step("calibrate")
    with prepared.stopwatch.stage("calibrate"):
        cached, held_out = _cached(prepared, ctx, watched)
        calibration = cached.finished({r.tensor for r in ctx.requests}) if cached else None
        notes: tuple[Note, ...] = ()
        if calibration is None:
            calibration, held_out, notes = _run(prepared, ctx, watched, cached, held_out.size)
    if cached is not None:
        notes += tuple(Note("calibration-resumed", text) for text in cached.notes)
    notes += (Note("one-batch", _ONE_BATCH),) if held_out.single else ()
    return _apply(prepared, ctx, calibration, held_out, notes)


def _cached(
    prepared: Prepared, ctx: Context, watched: Watched
) -> tuple[ResumableCalibration | None, HeldOut]:
    """The entry of this calibration in the cache; None without a cache, or for one-pass data.

    Its key needs the digest of all feeds, which are read without running the model.
    """
    cache, graph, recipe = prepared.options.cache, prepared.graph, prepared.recipe
    if cache is None or prepared.reusable_feeds is None:
        return None, HeldOut()
    held_out = _held_out(prepared)
    threads = prepared.options.threads or session.threads()
    parts = [
        environment(), threads, prepared.calibrating_provider, prepared.float_model.digest,
        printer.structure(graph), held_out.digest, recipe.calibrator,
        not recipe.calibrates_padding, prepared.options.max_memory,
        [repr(r) for r in ctx.requests], watched.channels, watched.moments,
        digest_feeds(_general_text(prepared, watched)),
    ]  # fmt: skip
    return ResumableCalibration(cache, key_of(parts)), held_out


def _general_text(prepared: Prepared, watched: Watched) -> Iterable[Feed]:
    """Feeds to run in addition to the data, if channels are watched."""
    text = prepared.general_text
    return text if watched.channels and text is not None else ()


def _run(
    prepared: Prepared,
    ctx: Context,
    watched: Watched,
    cached: ResumableCalibration | None,
    size: DataSize | None,
) -> tuple[Calibration, HeldOut, tuple[Note, ...]]:
    """Run the float model on all feeds, from the checkpoint of an earlier run if there is one."""
    options, graph = _options(prepared), prepared.graph
    calibrator = prepared.recipe.make_calibrator()

    def fresh() -> collector.Collector:
        known = graph, ctx.requests, calibrator, ctx.evaluate, options
        return collector.collector(*known, watched.channels, watched.moments)

    collecting = fresh() if cached is None else cached.resumed(fresh)
    text = _general_text(prepared, watched)
    digest, split = _observe(prepared, collecting, text, cached, size or _size(prepared))
    notes: tuple[Note, ...] = ()
    if collecting.lacks_rows:
        collecting, notes = fresh(), (Note("calibration-repeated", _UNEVEN),)
        digest, split = _observe(prepared, collecting, text, cached)
    ranges = collector.final_ranges(collecting)
    held_out = _checked(prepared, split, digest)
    account = CalibrationAccount(
        calibrator=prepared.recipe.calibrator,
        provider=prepared.options.provider or "cpu",
        feeds=collecting.feeds_seen,
        held_out=len(split.held_out),
        tensors=len(ctx.requests),
        general_text=bool(text),
        padding_left_out=options.mask and any(t.token_axis is not None for t in collecting.taps),
    )
    calibration = Calibration(ranges, collecting.channels(), account)
    if cached is not None:
        cached.finish(calibration)
    return calibration, held_out, notes


def _observe(
    prepared: Prepared,
    collecting: collector.Collector,
    text: Iterable[Feed],
    cached: ResumableCalibration | None,
    size: DataSize | None = None,
) -> tuple[FeedDigest, HoldOut]:
    """Show the collector all feeds that it has not seen; digest of the data, and how it was split.

    size: of the data, if known: then shards leave out rows that hardly enter a sample.
    """
    digest = FeedDigest()
    split = HoldOut(digest.passing(prepared.feeds or ()))
    feeds = split.calibration()
    merged = DataSize.of(islice(feeds, collecting.feeds_seen))
    workers = prepared.options.workers
    items = chain(
        shards(feeds, workers.shard),
        shards(text, workers.shard, background=True),
    )
    task = CalibrationTask(collecting, collecting.options.keep is not None, size, merged)
    with closing(workers.map(task, items)) as done:
        for shard in done:
            if shard.background:
                continue
            for _ in shard.feeds:
                prepared.progress.advance()
            if cached is not None:
                cached.checkpoint(collecting)
    return digest, split


def _size(prepared: Prepared) -> DataSize | None:
    """Of the data to calibrate with, where it is shared and can be read twice."""
    feeds = prepared.reusable_feeds
    if feeds is None or prepared.options.workers is LOCAL:
        return None
    return DataSize.of(HoldOut(feeds).calibration())


def _options(prepared: Prepared) -> collector.CollectorOptions:
    budget = prepared.budget
    keep = None if budget.store is None else budget.store.array
    settings = not prepared.recipe.calibrates_padding, prepared.options.threads
    provider = prepared.calibrating_provider
    return collector.CollectorOptions(
        budget.fetched, *settings, budget.parts, keep, provider=provider
    )


def _checked_calibration(
    prepared: Prepared, ctx: Context, calibration: Calibration | None
) -> Calibration:
    """A lock's calibration. Raises RecipeError where it lacks a tensor that the plan asks for."""
    if calibration is None or not calibration.covers({r.tensor for r in ctx.requests}):
        lock = prepared.options.lock
        changed = "; ".join(lock.changes()) if lock else ""
        raise RecipeError(
            "the lock's calibration does not fit the plan that this version makes"
            + (f": {changed}" if changed else "")
        )
    return calibration


def _check_memory(prepared: Prepared, text: Iterable[Feed] = ()) -> None:
    """Raises DataError if a sample does not fit; one-pass data is checked while it is read."""
    feeds = prepared.reusable_feeds
    if prepared.budget.limit is not None and feeds is not None:
        prepared.budget.check(chain(feeds, text))


def _checked_and_held_out(prepared: Prepared) -> HeldOut:
    """The data without calibration: it is only used to verify."""
    if prepared.feeds is None:
        return HeldOut()
    _check_memory(prepared)
    return _held_out(prepared)


def _held_out(prepared: Prepared) -> HeldOut:
    """Read all data without running it."""
    digest = FeedDigest()
    split = HoldOut(digest.passing(prepared.feeds or ()))
    size = DataSize.of(split.calibration())
    return replace(_checked(prepared, split, digest), size=size)


def _checked(prepared: Prepared, split: HoldOut, digest: FeedDigest) -> HeldOut:
    """The held-out feeds. Raises RecipeError where a lock was made with other data."""
    feeds = [part for feed in split.held_out for part in prepared.budget.parts(feed)]
    held_out = HeldOut(feeds, digest.hexdigest(), split.reused)
    lock_check.check_data(prepared.options.lock, held_out.digest, prepared.general_text)
    return held_out
