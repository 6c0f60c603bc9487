"""The stages of a compilation, in order: prepare → rewrite → verify → tune → search → bench."""

from __future__ import annotations

import logging
from dataclasses import replace

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.report import Report
from qcompile.compiler.search import lowering_tuner, mixed_precision, size_search
from qcompile.compiler.search.lowering_tuner import Tuned
from qcompile.compiler.search.measurable import (
    Measurable,
    PlannedWeight,
    measurable,
    planned_weights,
)
from qcompile.compiler.search.mixed_precision import Tools
from qcompile.compiler.search.size_search import SizeTools
from qcompile.compiler.stages import (
    lock_check,
    speed_forecast,
    write_lock,
)
from qcompile.compiler.stages.bench import bench, latency_ratio
from qcompile.compiler.stages.build_report import build_report
from qcompile.compiler.stages.models import size_failures
from qcompile.compiler.stages.options import Request
from qcompile.compiler.stages.prepare import prepare
from qcompile.compiler.stages.result import RejectedError, Result
from qcompile.compiler.stages.rewrite import Rewritten, rewrite
from qcompile.compiler.stages.verify import Verified, check_sizes, verify
from qcompile.compiler.training import trained_file, training_checks
from qcompile.errors import DataError, RecipeError
from qcompile.planning.context import Reasons
from qcompile.runtime.evaluation import user_metric

_LOG = logging.getLogger(__name__)


def compile_model(request: Request) -> Result:
    """Everything that ``qcompile.compile`` does with its settings in one request.

    Raises ModelError, DataError, RecipeError or TargetError on bad input; RejectedError where the
    result is worse or slower than the gates allow and ``options.force`` is off.
    """
    request = lock_check.apply_lock(request)
    _check_metric(request)
    training_checks.check_request(request)
    options = request.options
    workers, done_before = options.workers, options.workers.account()
    prepared = prepare(request)
    training_checks.check_prepared(prepared)
    forecast = speed_forecast.predict_speed(prepared)
    if forecast is not None:
        request.progress.step(f"predicted: {forecast.speedup:.1f}x")

    def rewritten(recipe: Recipe, reasons: Reasons | None = None) -> Rewritten:
        return rewrite(prepare(replace(request, recipe=recipe)), reasons)

    def built(recipe: Recipe, reasons: Reasons | None = None) -> Verified:
        return verify(rewritten(recipe, reasons))

    def measured(recipe: Recipe) -> Measurable:
        return measurable(prepare(replace(request, recipe=recipe)))

    def planned(recipe: Recipe) -> dict[str, PlannedWeight]:
        return planned_weights(prepare(replace(request, recipe=recipe)))

    verified = verify(rewrite(prepared))
    tuned = (
        lowering_tuner.tune_lowering(verified, rewritten, built)
        if options.tune
        else Tuned(verified)
    )
    searched = mixed_precision.search_precision(tuned.verified, Tools(built, measured))
    tools = SizeTools(built, measured, planned, latency_ratio)
    sized = size_search.search_size(searched.verified, tools)
    verified = sized.verified
    trained = trained_file.compare(verified)
    sizes = check_sizes(verified)
    compiled, limit = verified.rewritten.compiled, request.gates.max_size_ratio
    too_large = size_failures(
        prepared.float_model, compiled, limit, quantizes=prepared.mode != "float"
    )
    timed = bench(verified)
    locked = write_lock.compare_with_lock(verified.rewritten)
    cached = [] if options.cache is None else [Note("cache", text) for text in options.cache.notes]
    report = build_report(
        verified,
        timed,
        forecast,
        search=searched.account,
        sizes=sized.account,
        tuning=tuned.account,
        training=trained.account if trained is not None else None,
        cluster=workers.account(done_before),
        notes=(*tuned.notes, *searched.notes, *sized.notes, *locked.notes, *cached, *sizes),
        failures=(
            *(trained.failures if trained is not None else ()),
            *searched.failures,
            *sized.failures,
            *locked.failures,
            *too_large,
        ),
    )
    _log(report)
    keeps_lock = options.keep_lock or options.keep_calibration
    result = Result(
        verified.rewritten.compiled.files,
        report,
        lock=write_lock.make_lock(verified) if keeps_lock else None,
        calibration=verified.rewritten.calibrated.calibration,
    )
    if report.failures and not options.force:
        raise RejectedError(result)
    if (searched.account or sized.account) and not report.failures:
        mixed_precision.drop_search_states(options.search_state, options.bits_state)
    return result


def _log(report: Report) -> None:
    """The outcome at INFO, notes and what stayed as it was at DEBUG."""
    _LOG.info("%s", report.headline)
    for note in report.notes:
        _LOG.debug("note: %s", note.text)
    for skip in report.skips:
        _LOG.debug("%s", skip)


def make_measurable(request: Request) -> Measurable:
    """The model planned, calibrated and transformed, with a switch for each quantizer.

    Raises what ``compile_model`` does on bad input; DataError where no feeds are held out to
    measure on, or the memory budget is too small.
    """
    prepared = prepare(request)
    budget = prepared.budget
    excess = budget.excess_of(budget.switched, "measuring sensitivity")
    if excess is not None:
        raise DataError(excess.reason)
    return measurable(prepared)


def _check_metric(request: Request) -> None:
    """Raise RecipeError for a metric that is missing or cannot be loaded, before any work."""
    metric = request.options.metric
    if request.gates.min_metric is not None and metric is None:
        raise RecipeError("--min-metric needs a --metric, package.module:function")
    if metric is not None:
        user_metric.resolve_metric(metric)
