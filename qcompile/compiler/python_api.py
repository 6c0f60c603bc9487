"""The Python entry points: what the command line does, as functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from qcompile.compiler.config import lockfile
from qcompile.compiler.config.recipe import Recipe, merge_settings
from qcompile.compiler.driver import make_measurable
from qcompile.compiler.model_folder import tasks
from qcompile.compiler.model_folder.model_file import compile_one, model_source
from qcompile.compiler.progress import Callback, shown_progress
from qcompile.compiler.search.measurable import Measurable
from qcompile.compiler.search.policy import Sensitivity
from qcompile.compiler.search.policy import sensitivity as rank_by
from qcompile.compiler.search.precision_candidates import By
from qcompile.compiler.search.sensitivity import Measure
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.models import (
    in_float32_if_bfloat16,
    pooled_model,
    removed_outputs,
)
from qcompile.compiler.stages.options import CompileOptions, Request
from qcompile.compiler.stages.result import Result
from qcompile.data.feeds import Feed, Feeds, input_specs
from qcompile.data.open_data import Data, open_data
from qcompile.data.tokenizer import folder_near
from qcompile.errors import DataError, RecipeError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.read_model import Source
from qcompile.ir.model_io.write_model import ModelFiles
from qcompile.ir.pooling import EMBEDDING, PoolingKind
from qcompile.planning.context import WeightBits
from qcompile.quant import Array
from qcompile.quant.types import FEW_BITS
from qcompile.runtime import latency
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation import closeness, user_metric
from qcompile.runtime.evaluation.batch_invariance import invariance
from qcompile.runtime.evaluation.closeness import Gates, Verdict
from qcompile.runtime.evaluation.compared_outputs import (
    ComparedModels,
    compared_models,
    find_selection,
)
from qcompile.runtime.evaluation.trial_run import made_up_feeds, trial_run
from qcompile.runtime.evaluation.user_metric import Metric
from qcompile.runtime.latency import Comparison
from qcompile.runtime.request_load import Load
from qcompile.runtime.server_comparison import MOST_FEEDS, SECONDS, compare_under_load
from qcompile.runtime.session import (
    InferenceSession,
    NativeOptions,
    Provider,
    Session,
    SessionOptions,
    custom_operators,
)
from qcompile.system.progress import Progress
from qcompile.targets.target import Mode

Outputs = Mapping[str, Array]
LABELS = "labels"  # the metric that compares answers with the labels of the data
Run: TypeAlias = Callable[[Feed], Outputs]
Scorer: TypeAlias = Callable[[Run, Iterable[Feed]], float]


def compile(
    model: Source,
    data: Data | None = None,
    *,
    target: str | None = None,
    mode: Mode | None = None,
    calibrator: str | None = None,
    pipeline: str | None = None,
    keep_float: Sequence[str] | None = None,
    pooling: PoolingKind | None = None,
    normalize: bool | None = None,
    outputs: Sequence[str] | None = None,
    weight_bits: WeightBits | None = None,
    embedding_bits: WeightBits | None = None,
    weight_block: int | None = None,
    keep_padding_rows: bool | None = None,
    float16: bool | None = None,
    seed: int | None = None,
    recipe: Recipe | str | Path | None = None,
    gates: Gates | None = None,
    options: CompileOptions | None = None,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress | Callback | None = None,
) -> Result:
    """Compile a model (path, bytes or ModelProto) with calibration data in any accepted format.

    A folder stands for the one model in it, here and in the other functions, and text is read with
    the tokenizer next to a model unless another one is given.

    ``recipe`` is a Recipe, the name of one, a YAML file, or a lock. The named settings override it,
    except a lock, which must agree with them: it builds the same bytes again without data.
    ``pooling``: the model returns ``sentence_embedding`` [batch, hidden] in place of the states of
    its tokens [batch, sequence, hidden]; ``normalize``: of length 1. ``weight_bits`` and
    ``embedding_bits``: 2 to 8, of weights of linear layers and of tables; ``weight_block``: values
    of one of 2 to 7 bits that share a multiplier, 0 for one scale by channel (docs/precision.md).
    ``keep_padding_rows``: compute padded positions as the float model does, instead of skipping
    them. ``float16``: compute between the integers in float16 (targets tensorrt and qdq; cuda does
    so in any case). ``custom_ops``: libraries of custom operators, whose code runs. ``gates``:
    replace those of the recipe, all of them. ``progress``: called with the name of a stage, the
    units done, and their total or None; by default bars in notebooks that have ipywidgets. Raises
    ModelError, DataError, RecipeError or TargetError on bad input; RejectedError where the result
    is worse or slower than the gates allow and ``options.force`` is off.
    """
    settings = {
        "target": target,
        "mode": mode,
        "calibrator": calibrator,
        "pipeline": pipeline,
        "keep_float": None if keep_float is None else tuple(keep_float),
        "pooling": pooling,
        "normalize": normalize,
        "outputs": None if outputs is None else tuple(outputs),
        "weight_bits": weight_bits,
        "embedding_bits": embedding_bits,
        "weight_block": weight_block,
        "keep_padding_rows": keep_padding_rows,
        "float16": float16,
        "seed": seed,
    }
    options = options or CompileOptions()
    chosen = merge_settings(lockfile.recipe_of(recipe), settings, "compile()")
    locked = lockfile.requested_lock(recipe, chosen, "compile()")
    request = Request(
        model,
        data,
        recipe=chosen,
        gates=gates or chosen.make_gates(),
        options=options if locked is None else replace(options, lock=locked),
    )
    with custom_operators(custom_ops), shown_progress(progress) as shown:
        return compile_one(replace(request, progress=shown))


def session(
    model: Source,
    *,
    threads: int = 0,
    providers: Sequence[Provider] = (runtime.CPU,),
    options: NativeOptions | None = None,
    custom_ops: Sequence[str | Path] = (),
) -> InferenceSession:
    """An ``onnxruntime.InferenceSession`` for any ONNX model, with exact integer sums.

    On x86 without VNNI or AMX, for a file whose sums of int8 products can saturate, the session has
    the option ``session.x64quantprecision``; where that has no effect or fails, the graph is
    rewritten before it is loaded (docs/processors.md). Elsewhere, and for all other files, it is a
    default session. ``threads``: 0 leaves the number to ``options``, by default one per core that
    this process may use. ``options``: an ``onnxruntime.SessionOptions`` to start from.
    ``providers``: as for ``InferenceSession``; with any other than the CPU's, the graph is not
    rewritten. ``custom_ops``: libraries of custom operators, whose code runs. Raises ModelError
    where the model or a provider cannot be loaded, RecipeError where ``threads`` is negative.
    """
    if threads < 0:
        raise RecipeError(f"threads is {threads}, expected 0 or more")
    model = model_source(model)
    read_model.read_model(model)  # its errors name what is wrong with a file
    runs, native = read_model.runnable(model), options or NativeOptions()
    if threads or options is None:
        native.intra_op_num_threads = threads or runtime.threads()
    with custom_operators(custom_ops):
        exact = saturation_check.saturates_here(runs)
        return runtime.open_session(runs, native, providers, exact=exact)


def sensitivity(
    model: Source,
    data: Data,
    *,
    by: By = "tensor",
    measure: Measure = "both",
    bits: Sequence[int] = (),
    target: str | None = None,
    recipe: Recipe | str | Path | None = None,
    gates: Gates | None = None,
    options: CompileOptions | None = None,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress | Callback | None = None,
) -> Sensitivity:
    """Rank what is quantized by the output error that it causes, on held-out feeds.

    ``by``: tensor, role, layer or kind. ``measure``: "alone" quantizes each item alone, "lifted"
    quantizes all others. ``bits``: widths from 2 to 7, at each of which every weight alone is
    measured too. ``custom_ops``: libraries of custom operators, whose code runs.
    The result's ``policy()`` is a recipe that passes ``gates``. Raises ModelError, DataError,
    RecipeError or TargetError on bad input.
    """
    chosen = merge_settings(lockfile.recipe_of(recipe), {"target": target}, "sensitivity()")
    request = Request(
        model_source(model),
        data,
        recipe=chosen,
        gates=gates or chosen.make_gates(),
        options=options or CompileOptions(),
    )
    strange = [b for b in bits if b not in FEW_BITS]
    if strange:
        raise RecipeError(f"a weight of {strange[0]} bits cannot be measured, expected 2 to 7")

    with custom_operators(custom_ops), shown_progress(progress) as shown:
        watched = replace(request, progress=shown)

        def model_of(recipe: Recipe) -> Measurable:
            return make_measurable(replace(watched, recipe=recipe))

        workers = watched.options.workers
        before = workers.account()
        found = rank_by(make_measurable(watched), by, measure, bits, model_of)
        return replace(found, cluster=workers.account(before))


def verify(
    reference: Source,
    candidate: Source,
    data: Data,
    *,
    gates: Gates | None = None,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    text_columns: Sequence[str] = (),
    isa: str = "",
    pooling: PoolingKind | None = None,
    normalize: bool = False,
    metric: Metric | str | None = None,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress | Callback | None = None,
) -> Verdict:
    """Compare the outputs of two models on data, which is read as ``open_data`` says.

    ``isa``: instruction set that the candidate will run on, as in a recipe; by default any, so that
    the worse verdict counts where x86 without VNNI computes other outputs. ``pooling`` and
    ``normalize``: compare embeddings; a model that does not return ``sentence_embedding`` is pooled
    so. A model that computes in bfloat16 is run in float32. ``metric``: also measure both models,
    by a function of feeds and outputs or its name ``package.module:function``, or by "labels", the
    metric of the task (accuracy, F1, Spearman's correlation; times 100) on the labels of ``data``,
    a .jsonl or .csv file (its first ``samples`` rows, all by default), where config.json next to
    the tokenizer names the task. ``custom_ops``: libraries of custom operators, whose code runs.
    Raises ModelError, DataError, RecipeError or TrainingError on bad input.
    """
    isa = Recipe(isa=isa, pooling=pooling or "", normalize=normalize).isa
    gates = gates or Gates()
    if gates.min_metric is not None and metric is None:
        raise RecipeError("--min-metric needs a --metric: labels, or package.module:function")
    reference, candidate = model_source(reference), model_source(candidate)
    near = folder_near(reference, candidate)
    tokenizer = Path(tokenizer) if tokenizer is not None else near
    with custom_operators(custom_ops), shown_progress(progress) as shown:
        raised = [in_float32_if_bfloat16(model) for model in (reference, candidate)]
        reference = reference if raised[0] is None else raised[0].path
        candidate = candidate if raised[1] is None else raised[1].path
        # Raises errors that name what is wrong with a file, before the runtime loads it.
        compiled = read_model.load(candidate)
        shape_inference.infer(compiled)
        graph = read_model.load(reference)
        shape_inference.infer(graph)
        if pooling is not None:
            old, new = ([t.name for t in g.outputs] for g in (graph, compiled))
            pooled = (
                _pooled(reference, graph, pooling, normalize, keep=new),
                _pooled(candidate, compiled, pooling, normalize, keep=old),
            )
            reference, candidate = (m.path if isinstance(m, ModelFiles) else m for m in pooled)
        feeds = open_data(
            data,
            input_specs(graph),
            tokenizer=tokenizer,
            samples=samples,
            batch_size=batch_size,
            max_length=max_length,
            text_columns=text_columns,
            takes=trial_run(lambda: read_model.runnable(reference)),
            progress=shown,
        )
        scorer = None
        if metric == LABELS:
            given = {"batch_size": batch_size, "max_length": max_length, "samples": samples}
            scorer = _by_labels(data, graph, tokenizer, text_columns, **given)
        elif metric is not None:
            scorer = partial(_by_function, metric)
        models = compared_models(find_selection(graph), reference, candidate)
        shown.step("verify")
        whole = saturation_check.IntegerSums(candidate, isa)
        removed = removed_outputs(compiled, graph)
        return _compared(models, feeds, gates, whole, removed, scorer, shown)


def _by_function(metric: Metric | str, run: Run, feeds: Iterable[Feed]) -> float:
    """The user's metric of a model on feeds. Raises DataError where it fails."""
    known = list(feeds)
    return user_metric.measure(metric, known, [run(feed) for feed in known])


def _by_labels(
    data: Data,
    graph: Graph,
    tokenizer: Path | None,
    columns: Sequence[str],
    **given: int | None,
) -> Scorer:
    """The metric of the task on labelled text. Raises DataError, ModelError or TrainingError."""
    from qcompile.training.labelled.model_score import LabelledScorer

    if not isinstance(data, str | Path) or Path(data).suffix.lower() not in (".csv", ".jsonl"):
        raise DataError("--metric labels needs labelled text, a .jsonl or .csv file")
    assert tokenizer is not None  # text was read with it
    file = tokenizer / "config.json"
    config = tasks.read_json(file) if file.is_file() else {}
    labelled = LabelledScorer.open(
        Path(data),
        graph,
        config,
        tokenizer,
        columns=columns,
        **given,
    )

    def score(run: Run, _feeds: Iterable[Feed]) -> float:
        found = labelled.score(run)
        if math.isnan(found.value):
            raise DataError(f"{found.metric} is not defined on these labels and outputs")
        return found.value

    return score


def _pooled(
    model: Source, graph: Graph, pooling: PoolingKind, normalize: bool, keep: Sequence[str]
) -> Source | ModelFiles:
    """The model with pooling, and its graph too; itself if it returns ``sentence_embedding``."""
    if any(t.name == EMBEDDING for t in graph.outputs):
        return model
    return pooled_model(graph, pooling, normalize=normalize, keep=keep)


def _compared(
    models: ComparedModels,
    feeds: Feeds,
    gates: Gates,
    whole: saturation_check.IntegerSums,
    removed: set[str],
    scorer: Scorer | None,
    progress: Progress,
) -> Verdict:
    # A candidate that is fed what decides its selections is another graph than the whole one.
    sums = saturation_check.IntegerSums(models.candidate, whole.isa) if models.fed else whole
    # Data that can be read only once is stored if a model runs more than once.
    runs = len(sums.kinds) > 1 or scorer is not None
    stored = [*feeds] if runs and not feeds.reusable else feeds
    options, old = SessionOptions(), Session(models.reference)
    of_float = None if scorer is None else scorer(old.run, stored)

    def outputs(runner: saturation_check.Runner) -> Iterator[tuple[Outputs, Outputs, Feed]]:
        for feed in stored:
            expected = {k: v for k, v in old.run(feed).items() if k not in removed}
            yield expected, models.named(runner.run(models.feed(feed, expected))), feed
            progress.advance()

    def judge(kind: str) -> Verdict:
        runner = sums.runner(kind, options)
        verdict = closeness.judge(outputs(runner), gates)
        if scorer is not None and of_float is not None:
            alone = whole.runner(kind, options) if models.fed else runner
            verdict.measured(of_float, scorer(alone.run, stored), gates)
        verdict = runner.on(verdict)
        if models.fed or not feeds.reusable:
            return replace(verdict, selection=models.note or None)
        return invariance(runner.run, feeds).on(verdict)

    return saturation_check.judge_by_sums(sums, judge)


def bench(
    models: Sequence[Source],
    *,
    dims: Mapping[str, int] | None = None,
    shapes_of: Mapping[str, Sequence[int]] | None = None,
    data: Data | None = None,
    options: latency.TimingOptions | None = None,
    custom_ops: Sequence[str | Path] = (),
    streams: int | None = None,
    arrival: float | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    text_columns: Sequence[str] = (),
    progress: Progress | Callback | None = None,
) -> Comparison:
    """Time models in alternating rounds on random inputs, or on the first feed of ``data``.

    The first model is the reference. Sessions are opened as by ``session``: those of models whose
    int8 sums would saturate on this processor have exact sums, as the result's ``session_options``
    say. Models that compute in bfloat16 are timed in float32. ``custom_ops``: libraries of custom
    operators, whose code runs. With ``streams`` (requests that are computed at the same time) or
    ``arrival`` (requests per second that arrive at random) models are compared under load, on up to
    256 feeds of ``data``: figures are in ``server`` of the result and of its ``models``. ``seed``
    is that of the arrivals and of the order of the feeds.
    Raises ModelError or DataError on bad input.
    """
    if not models:
        raise DataError("nothing to time: give at least one model")
    models = [model_source(model) for model in models]
    load = None
    if streams is not None or arrival is not None:
        load = Load(1 if streams is None else streams, arrival, seed)
    for other in models[1:]:
        shape_inference.infer(read_model.load(other))
    graph = read_model.load(models[0])
    shape_inference.infer(graph)
    raised = [in_float32_if_bfloat16(model) for model in models]
    running = [m if r is None else r.path for m, r in zip(models, raised, strict=True)]
    labels = [_label(m, i) for i, m in enumerate(models)]
    labelled = [*zip(labels, map(read_model.runnable, running), strict=True)]
    with custom_operators(custom_ops), shown_progress(progress) as shown:
        if data is not None:
            read = open_data(
                data,
                input_specs(graph),
                tokenizer=tokenizer or folder_near(*models),
                samples=samples,
                batch_size=batch_size,
                max_length=max_length,
                text_columns=text_columns,
                takes=trial_run(lambda: labelled[0][1]),
                progress=shown,
            )
            feeds = list(islice(read, 1 if load is None else MOST_FEEDS))
        else:
            feeds = made_up_feeds(graph, labelled[0][1], dims or {}, shapes=shapes_of)
        if options is None:
            usual = latency.TimingOptions()
            options = usual if load is None else replace(usual, seconds=SECONDS)
        exact = options.exact | saturation_check.saturating_here(labelled, options.provider)
        options = replace(options, exact=exact)
        shown.step("bench", options.rounds)
        if load is None:
            return latency.compare_latency(labelled, feeds[0], options, shown.advance)
        return compare_under_load(labelled, feeds, load, options, shown.advance)


def _label(model: Source, index: int) -> str:
    return str(model) if isinstance(model, str | Path) else f"model {index}"
