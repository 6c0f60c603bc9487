"""From model to bytes: load → simplify → plan → collect → transform → insert → lower → check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import numpy as np

from qcompile import __version__
from qcompile.compiler.config import lowering_forms
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report import ledger
from qcompile.compiler.report.channel_views import ChannelWatch
from qcompile.compiler.report.report import Report
from qcompile.compiler.search import (
    fake_quantized,
    lift_items,
    lowering_tuner,
    mixed_precision,
)
from qcompile.compiler.search.sensitivity import Measurable, Meter
from qcompile.compiler.stages import calibrate, fix_dims, lock_check, speed_forecast, verify
from qcompile.compiler.stages.job import Job
from qcompile.compiler.stages.options import CompileOptions, Progress, Silent
from qcompile.compiler.stages.result import RejectedError, Result
from qcompile.data.feeds import Feeds, input_specs
from qcompile.data.open_data import Data, general_text, open_data
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import DataError, ModelError, RecipeError, TargetError
from qcompile.ir import Graph
from qcompile.ir.analysis import prequantized, shape_inference
from qcompile.ir.model_io import external_data, from_proto, read_model, write_model
from qcompile.planning import Context, PassSettings
from qcompile.planning.context import Reasons
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.rewriting.instruments import Dump, Instrument, Time, Verify
from qcompile.rewriting.pass_manager import PassManager
from qcompile.rewriting.pipeline_spec import parse, spell
from qcompile.rewriting.registry import target as find_target
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation import user_metric
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.memory_budget import Budget
from qcompile.system import digests, threads
from qcompile.targets import instruction_sets, requirements
from qcompile.targets.target import LoweringChoice, Mode, Target

# The order matters: shapes fold once identities are gone, fusions need the raised opset, and the
# attention scale folds once nothing but a product reads the tensors on its way.
SIMPLIFY = (
    "fold-constants,eliminate-identity,fold-shapes,fold-constants,merge-duplicates,"
    "eliminate-identity,fold-batchnorm,raise-opset,fuse-layernorm,fuse-gelu,fuse-hardswish,"
    "fold-attention-scale,merge-duplicates"
)
PLAN = "plan-operands,plan-convolutions,plan-products,plan-interior"
INSERT = "insert-qdq"
NO_TRANSFORMS = "none"


def compile_job(
    model: read_model.Source,
    data: Data | None,
    recipe: Recipe,
    gates: Gates,
    options: CompileOptions,
    progress: Progress | None = None,
) -> Result:
    """Everything ``qcompile.compile`` does, once its settings are one recipe.

    Raises ModelError, DataError, RecipeError or TargetError on bad input; RejectedError where the
    result is worse or slower than ``gates`` allow and ``options.force`` is off.
    """
    shown = progress or Silent()
    options = lock_check.options_for(options, data)

    def prepare(wanted: Recipe) -> Job:
        return _prepare(model, data, wanted, gates, options, shown)

    def finished(job: Job, reasons: Reasons = ()) -> tuple[Job, write_model.ModelFiles]:
        ctx = _context(job, reasons=reasons)
        _transform(job, ctx)
        return job, _finish(job, ctx)

    def verified(job: Job, compiled: write_model.ModelFiles) -> mixed_precision.Built:
        return mixed_precision.Built(job, compiled, verify.verify(job, compiled.path))

    def build(wanted: Recipe, reasons: Reasons) -> mixed_precision.Built:
        return verified(*finished(prepare(wanted), reasons))

    if gates.min_metric is not None and options.metric is None:
        raise RecipeError("--min-metric needs a --metric, package.module:function")
    if options.metric is not None:
        user_metric.named(options.metric)  # fail on a wrong name before any work
    first = prepare(recipe)
    expected = speed_forecast.expected(first)
    if expected is not None:
        shown.step(f"expect about {expected.speedup:.1f}x")
    made = verified(*finished(first))
    if options.tune:
        made = _tuned(made, lambda wanted: finished(prepare(wanted)), build)
    if mixed_precision.is_wanted(made.job):
        made = mixed_precision.search(
            made, mixed_precision.Tools(build, lambda r: switchable(prepare(r)))
        )
    job, compiled = made.job, made.model
    job.report.forecast = {} if expected is None else expected.to_dict()
    verify.bench(job, compiled.path, made.feeds)
    job.report.notes += verify.over_budget(job)
    lock_check.judge(job)
    if options.cache is not None:
        job.report.notes += options.cache.notes
    result = Result(compiled, job.report)
    if options.keep_lock or options.keep_calibration:
        result.lock, result.calibration = lock_check.lock_of(job, compiled), job.calibration
    if job.report.failures and not job.options.force:
        raise RejectedError(result)
    mixed_precision.forget(job)
    return result


def _tuned(
    first: mixed_precision.Built,
    assemble: lowering_tuner.Assemble,
    build: Callable[[Recipe, Reasons], mixed_precision.Built],
) -> mixed_precision.Built:
    """The build with the fastest forms; the first where none is faster, or the gates refuse it."""
    why_not = lowering_tuner.refusal(first)
    if why_not is not None:
        first.job.report.notes.append(f"not tuned: {why_not}")
        return first
    best, tried = lowering_tuner.tune(first, assemble)
    made = first if best == first.job.recipe else build(best, ())
    notes = ["forms tried: " + "; ".join(map(lowering_tuner.told, tried))] if tried else []
    if made.job.report.failures and not first.job.report.failures:
        notes.append(f"the faster forms are not taken: {made.job.report.failures[0]}")
        made = first
    made.job.report.notes += notes
    made.job.report.tuning = lowering_tuner.account(tried, verify.largest(first.feeds))
    return made


def measurable(
    model: read_model.Source,
    data: Data,
    recipe: Recipe,
    gates: Gates,
    options: CompileOptions,
    progress: Progress | None = None,
) -> Measurable:
    """The model planned, calibrated and transformed, with a switch for each quantized tensor.

    Raises what ``compile_job`` does on bad input; DataError where no feeds are left to measure on.
    """
    job = _prepare(model, data, recipe, gates, options, progress or Silent())
    excess = job.budget.excess_of(job.budget.switched, "measuring sensitivity")
    if excess is not None:
        raise DataError(excess)
    return switchable(job)


def switchable(job: Job) -> Measurable:
    """Run a job up to insertion, and build the switched model in its stead."""
    ctx, checks = _context(job, may_widen=True), [Verify()]
    early, late = _passes(job)
    _run(job, ctx, early, checks, "simplify and plan")
    known = lift_items.origins(job.graph, ctx)
    calibrate.calibrate(job, ctx, late)
    transforms = [p for p in late if p.stage == Stage.TRANSFORM]
    rounding = [*takewhile(lambda p: p.numerics is not Numerics.LOSSY, transforms)]
    _run(job, ctx, rounding, checks, "transform")
    plain = fake_quantized.plain_forms(job.graph, ctx)
    _run(job, ctx, transforms[len(rounding) :], checks, "transform")
    if not job.held_back:
        raise DataError("no feeds are left to measure on: give more data")
    found = fake_quantized.switches(ctx)
    if not found:
        raise TargetError(
            f"nothing is quantized, so nothing can be ranked: {calibrate.why_float(ctx)}"
        )
    divisible = job.budget.divisible
    made = fake_quantized.build(job.graph, ctx, found, plain)
    session = runtime.SessionOptions(job.options.threads, provider=job.provider)
    meter = Meter(
        made, job.running, job.held_back, job.report.gates, job.options.metric, session, divisible
    )
    return Measurable(job, ctx, meter, known)


def default_pipeline(
    target: Target, mode: Mode, transforms: str = "", choices: Sequence[LoweringChoice] = ()
) -> str:
    """The pipeline string of a target and mode.

    ``transforms``: passes that rewrite by calibrated ranges, ``""`` for the target's own, ``none``
    for none. ``choices``: other ways of lowering than the target's own.
    """
    quantize: list[str] = []
    if mode != "float":
        own = target.transform.get(mode, ())
        chosen = [] if transforms == NO_TRANSFORMS else [transforms] if transforms else [*own]
        quantize = [PLAN, *chosen, INSERT]
    return ",".join([SIMPLIFY, *quantize, *lowering_forms.lowered(target, mode, choices)])


def _prepare(
    model: read_model.Source,
    data: Data | None,
    recipe: Recipe,
    gates: Gates,
    options: CompileOptions,
    progress: Progress,
) -> Job:
    target = instruction_sets.fitted(find_target(recipe.target), recipe.isa)
    locked = options.lock
    mode = locked.mode if locked is not None else _mode(recipe, target, data is not None)
    recipe.make_calibrator()  # fail on a wrong name before any work
    choices = lowering_forms.chosen(target, mode, recipe)
    progress.step("load")
    reference = read_model.runnable(model)
    proto, storage = read_model.read_model(model)
    size = len(reference) if isinstance(reference, bytes) else reference.stat().st_size
    size += external_data.external_bytes(proto)
    external = read_model.external_files(proto, storage)
    graph = from_proto.from_proto(proto, storage)
    fix_dims.fix_dims(graph, dict(recipe.dims))
    unknown = shape_inference.infer(graph)
    report = Report(
        source=Path(model).name if isinstance(model, str | Path) else "model in memory",
        target=target.name,
        mode=mode,
        recipe=asdict(recipe),
        digest=recipe.digest(),
        pipeline="",
        gates=gates,
        float_bytes=size,
        float_content=ledger.summary(ledger.rows(proto, size)),
    )
    feeds = _open(graph, data, options)
    divisible = all(t.shape and not isinstance(t.shape[0], int) for t in graph.inputs)
    budget = Budget(options.max_memory, graph, runtime.evaluate, divisible)
    if budget.store is not None:
        graph.keep = budget.store.constant
    args = (graph, reference, recipe, target, mode, options, progress, report, feeds, budget)
    job = Job(*args, external, choices)
    if recipe.general_text and data is not None:
        given = options.tokenizer, options.batch_size
        job.general_text = general_text(data, input_specs(graph), *given)
    lock_check.check_lock(job)
    if unknown:
        _record_types(job, unknown)
    return job


def _mode(recipe: Recipe, target: Target, has_data: bool) -> Mode:
    mode = recipe.mode or (target.with_data if has_data else target.without_data)
    if mode is None:
        others = " or ".join(m for m in target.modes if m != "static")
        raise DataError(
            f"target {target.name!r} needs calibration data: give --data, or --mode {others}"
        )
    if mode not in target.modes:
        known, why = ", ".join(target.modes), target.no_modes.get(mode)
        reason = f" ({why})" if why else ""
        raise TargetError(
            f"target {target.name!r} has no mode {mode!r}, expected one of {known}{reason}"
        )
    if mode == "static" and not has_data:
        raise DataError("mode static needs calibration data: give --data, or --mode dynamic")
    return mode


def _open(graph: Graph, data: Data | None, options: CompileOptions) -> Feeds | None:
    if data is None:
        return None
    return open_data(
        data,
        input_specs(graph),
        tokenizer=options.tokenizer,
        samples=options.samples,
        batch_size=options.batch_size,
    )


def _record_types(job: Job, unknown: list[str]) -> None:
    """Types and ranks that inference could not find, from one run of the float model."""
    try:
        feed = (
            next(iter(job.feeds))
            if job.feeds is not None and job.feeds.reusable
            else synthetic_feeds(job.graph, {}, 1, job.recipe.seed)[0]
        )
        model, folder = write_model.with_external_weights(job.graph)
        tapped = write_model.save(runtime.with_outputs(model, unknown), folder)
        seen = runtime.record_types(tapped, feed)
    except (DataError, ModelError) as e:
        job.report.notes.append(f"{len(unknown)} tensors have no known type: {e}")
        return
    tensors = job.graph.tensors()
    for name, (dtype, rank) in seen.items():
        tensors[name].dtype = np.dtype(dtype)
        tensors[name].shape = tensors[name].shape or [None] * rank


def _context(job: Job, reasons: Reasons = (), *, may_widen: bool = False) -> Context:
    settings = job.recipe
    own = not (settings.transforms or settings.pipeline)  # the target's guard against outliers too
    choices = PassSettings(
        job.mode,
        settings.keep_float,
        settings.seed,
        settings.precision,
        reasons,
        may_widen,
        lowering_forms.attention(job.choices)
        or settings.attention
        or (job.target.attention if own else "float"),
    )
    ctx = Context(job.target, runtime.evaluate, choices)
    ctx.original_names = frozenset([*(n.name for n in job.graph.nodes), *job.graph.tensors()])
    return ctx


def _passes(job: Job) -> tuple[list[Pass], list[Pass]]:
    """The pipeline up to the plan, and what comes after it."""
    own = default_pipeline(job.target, job.mode, job.recipe.transforms, job.choices)
    passes = parse(job.recipe.pipeline or own)
    job.report.pipeline = spell(passes)
    early = [p for p in passes if p.stage <= Stage.PLAN]
    return early, [p for p in passes if p.stage > Stage.PLAN]


def _transform(job: Job, ctx: Context) -> None:
    """Run the pipeline, collecting ranges between the plan and what needs it."""
    timer = Time()
    instruments: list[Instrument] = [Verify(), timer]
    if job.options.dump_dir is not None:
        instruments.insert(0, Dump(job.options.dump_dir))  # before a check can stop the run
    came = prequantized.inventory(job.graph)
    if came:
        before = prequantized.compiled_before(job.graph)
        job.report.notes.append(f"the model came in quantized{before}: {came} stay as they are")
    early, late = _passes(job)
    _run(job, ctx, early, instruments, "simplify and plan")
    calibrate.calibrate(job, ctx, late)
    transforms = [p for p in late if p.stage is Stage.TRANSFORM]
    watch = ChannelWatch()
    _run(job, ctx, transforms, [*instruments, watch], "transform")
    job.report.channels = watch.to_dicts()
    ctx.channels.clear()  # nothing looks at samples from here on, and they are large
    _run(job, ctx, late[len(transforms) :], instruments, "quantize and lower")
    ctx.rounded.clear()  # they are constants of the graph now
    job.report.passes, job.report.skips = timer.records, ctx.skips
    job.quantized = any(ctx.plan.quantized())
    if job.mode != "float" and not job.quantized:
        beside = "beside what came in quantized, " if came else ""
        job.report.notes.append(f"nothing was quantized: {beside}{calibrate.why_float(ctx)}")


def _run(
    job: Job, ctx: Context, passes: Sequence[Pass], instruments: Sequence[Instrument], what: str
) -> None:
    job.progress.step(what, len(passes))
    with job.timed(what), threads.one_thread():
        manager = PassManager(tuple(passes), instruments)
        manager.run(job.graph, ctx, lambda _name: job.progress.advance())


def _finish(job: Job, ctx: Context) -> write_model.ModelFiles:
    """Metadata in, files out, ledger made."""
    job.graph.header.metadata.update(
        {
            "qcompile.version": __version__,
            "qcompile.recipe": job.report.digest,
            "qcompile.target": job.target.name,
        }
    )
    held = requirements.require(job.graph, job.target.name, job.target.requires)
    job.report.requirements = held.checked
    job.report.notes += held.remarks
    compiled = write_model.write_model(job.graph, job.options.stem)
    model, _storage = read_model.read_model(compiled.path)
    job.report.bytes = compiled.size
    job.report.model_sha256 = digests.of_file(compiled.path)
    job.report.int8_products = ledger.products_of_data(model)
    job.report.ledger = ledger.rows(model, compiled.size, ctx)
    return compiled
