"""The first stage: the model as a graph, its data opened, the target and mode resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.compiler.config import lowering_options
from qcompile.compiler.config.recipe import AUTO, Recipe
from qcompile.compiler.report.notes import Note
from qcompile.compiler.stages import lock_check
from qcompile.compiler.stages.models import (
    BFLOAT16_NOTE,
    FloatModel,
    choose_outputs,
    computes_in_bfloat16,
    in_float32,
    read_float_model,
    written,
)
from qcompile.compiler.stages.options import CompileOptions, Request
from qcompile.data.feeds import Feeds, input_specs, takes_any_batch
from qcompile.data.open_data import general_text, open_data
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import DataError, ModelError, RecipeError, TargetError
from qcompile.ir import Graph
from qcompile.ir.analysis import dimension_names, shape_inference
from qcompile.ir.model_io import read_model, write_model
from qcompile.ir.operators import BUILT_IN_DOMAINS
from qcompile.rewriting.registry import nearest
from qcompile.rewriting.registry import target as find_target
from qcompile.runtime import session
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.evaluation.compared_outputs import Selection, find_selection
from qcompile.runtime.evaluation.trial_run import trial_run
from qcompile.runtime.memory_budget import Budget
from qcompile.runtime.providers import PROVIDERS, check_provider
from qcompile.system.progress import Progress, Stopwatch
from qcompile.targets import instruction_sets
from qcompile.targets.target import LoweringChoice, Mode, Target


@dataclass(frozen=True)
class Prepared:
    """``graph``: rewritten by the next stages. ``choices``: of lowering options, other than the
    target's own. ``general_text``: feeds to run in addition to the data, for channels that passes
    watch. ``unknown_operator``: one that ONNX Runtime does not have, so that neither model
    can run here; empty if they can. ``selection``: where the float model selects by values."""

    request: Request
    float_model: FloatModel
    graph: Graph
    target: Target
    mode: Mode
    choices: list[LoweringChoice]
    feeds: Feeds | None
    general_text: Feeds | None
    budget: Budget
    unknown_operator: str = ""
    selection: Selection | None = None
    notes: tuple[Note, ...] = ()
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def recipe(self) -> Recipe:
        return self.request.recipe

    @property
    def gates(self) -> Gates:
        return self.request.gates

    @property
    def options(self) -> CompileOptions:
        return self.request.options

    @property
    def progress(self) -> Progress:
        return self.request.progress

    @property
    def provider(self) -> str:
        """The execution provider here: the target's, or the CPU's where that is not installed."""
        return session.provider_or_cpu(self.target.provider)

    @property
    def provider_missing(self) -> bool:
        """True if the target's provider is emulated here, and its speed unknown."""
        return self.provider != self.target.provider

    @property
    def calibrating_provider(self) -> str:
        """The execution provider of the float model in calibration."""
        return PROVIDERS[self.options.provider or "cpu"]

    @property
    def ranking_provider(self) -> str:
        """The execution provider of models that are compared to rank tensors."""
        choice = self.options.provider
        return self.provider if choice is None else PROVIDERS[choice]

    @property
    def rounds_to_float16(self) -> bool:
        """True if outputs are compared with every float16 result rounded, which the provider here
        does not do."""
        form = self.target.half_form
        emulated = form is not None and form.emulated and self.recipe.float16
        return self.provider_missing or emulated

    @property
    def reusable_feeds(self) -> Feeds | None:
        """The data if it can be read repeatedly, else None."""
        return self.feeds if self.feeds is not None and self.feeds.reusable else None


def prepare(request: Request) -> Prepared:
    """Load the model and open the data.

    Raises ModelError, DataError, RecipeError or TargetError on bad input.
    """
    recipe, options, locked = request.recipe, request.options, request.options.lock
    target = instruction_sets.fitted(find_target(recipe.target), recipe.isa)
    if recipe.float16:
        target = target.in_float16()
    has_data = request.data is not None
    mode = locked.mode if locked is not None else _mode(recipe, target, has_data=has_data)
    recipe.make_calibrator()  # raises for unknown names before any work
    if options.provider is not None:
        check_provider(options.provider)
    choices = lowering_options.chosen_options(target, mode, recipe)
    request.progress.step("load")
    model, graph = read_float_model(request.model)
    notes = [*request.notes, *lock_check.check_model(locked, model, request.source)]
    if recipe.pooling == AUTO:
        raise RecipeError(
            "pooling auto is for folders with modules.json: name one for a file (--pooling mean)"
        )
    if recipe.pooling or recipe.outputs:
        choose_outputs(graph, recipe.outputs, recipe.pooling, normalize=recipe.normalize)
        model = replace(model, derived=written(graph))
    fix_dims(graph, dict(recipe.dims))
    dimension_names.separate_names(graph, session.evaluate)
    unknown = shape_inference.infer(graph)
    if computes_in_bfloat16(graph):
        given = request.model if model.derived is None else model.derived.path
        model = replace(model, derived=in_float32(given))
        notes.append(Note("bfloat16-raised", f"the model {BFLOAT16_NOTE}"))
    feeds, text = _open(request, graph, model)
    notes += [Note("text-cut", feeds.note)] if feeds is not None and feeds.note else []
    notes += [Note("rows-drawn", feeds.drawn)] if feeds is not None and feeds.drawn else []
    budget = Budget(options.max_memory, graph, session.evaluate, takes_any_batch(graph))
    if budget.store is not None:
        graph.keep = budget.store.constant
    custom = not graph.domains().keys() <= BUILT_IN_DOMAINS
    missing = session.unknown_operator(model.running) if custom else ""
    if missing:
        _check_needs_no_run(target, mode, missing, tune=options.tune)
    elif unknown:
        notes += _record_types(graph, unknown, feeds, recipe.seed)
    return Prepared(
        request,
        model,
        graph,
        target,
        mode,
        choices=choices,
        feeds=feeds,
        general_text=text,
        budget=budget,
        unknown_operator=missing,
        selection=find_selection(_running_graph(model, graph)),
        notes=tuple(notes),
    )


def _running_graph(model: FloatModel, graph: Graph) -> Graph:
    """The graph of the float model as it runs here: in float32 for bfloat16, pooled, with the
    outputs that are kept."""
    if model.derived is None:
        return graph
    derived = read_model.load(model.derived.path)
    shape_inference.infer(derived)
    return derived


def _mode(recipe: Recipe, target: Target, *, has_data: bool) -> Mode:
    mode = recipe.mode or (target.with_data if has_data else target.without_data)
    if mode is None:
        others = " or ".join(m for m in target.modes if m != "static")
        raise DataError(
            f"target {target.name!r} needs calibration data: give --data, or --mode {others}"
        )
    if mode not in target.modes:
        names, why = ", ".join(target.modes), target.no_modes.get(mode)
        reason = f" ({why})" if why else ""
        raise TargetError(
            f"target {target.name!r} has no mode {mode!r}, expected one of {names}{reason}"
        )
    if mode == "static" and not has_data:
        raise DataError("mode static needs calibration data: give --data, or --mode dynamic")
    return mode


def _check_needs_no_run(target: Target, mode: Mode, operator: str, *, tune: bool) -> None:
    """Raises ModelError where the model has to run, but ONNX Runtime lacks an operator."""
    if mode != "static" and not tune:
        return
    others = " or ".join(m for m in target.modes if m != "static")
    what = "--tune" if tune else "mode static"
    raise ModelError(
        f"{what} runs the model, and ONNX Runtime has no operator {operator}: give the library "
        f"that has it (--custom-ops LIBRARY), or choose --mode {others}, which need no run"
    )


def fix_dims(graph: Graph, dims: Mapping[str, int]) -> None:
    """Fix symbolic dimensions at a size, all of the name, in declared shapes of inputs and outputs.

    ``batch`` fixes ``batch#0`` too. Raises RecipeError for a name that no input has.
    """
    named = {d for t in graph.inputs for d in t.shape or () if isinstance(d, str)}
    known = named | {dimension_names.base_name(d) for d in named}
    for name in dims:
        if name not in known:
            hint = nearest(name, sorted(known)) if known else ": none has a name"
            raise RecipeError(f"no dimension of the model's inputs is named {name!r}{hint}")
    dims = {d: dims[b] for d in known if (b := dimension_names.base_name(d)) in dims} | dict(dims)
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.shape is not None:
            tensor.shape = [dims.get(d, d) if isinstance(d, str) else d for d in tensor.shape]
    for info in graph.header.interface.values():
        for dim in info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ():
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]


def _open(request: Request, graph: Graph, model: FloatModel) -> tuple[Feeds | None, Feeds | None]:
    """The data, and the general text to run with it."""
    if request.data is None:
        return None, None
    options, inputs = request.options, input_specs(graph)
    takes = trial_run(lambda: model.running, options.threads)
    feeds = open_data(
        request.data,
        inputs,
        tokenizer=request.tokenizer,
        samples=options.samples,
        batch_size=options.batch_size,
        max_length=options.max_length,
        text_columns=options.text_columns,
        takes=takes,
        seed=request.recipe.seed,
        draw=options.training is not None,
        progress=request.progress,
    )
    if not request.recipe.general_text:
        return feeds, None
    text = general_text(
        feeds,
        request.tokenizer,
        options.batch_size,
        max_length=options.max_length,
        takes=takes,
    )
    return feeds, text


def _record_types(graph: Graph, unknown: list[str], feeds: Feeds | None, seed: int) -> list[Note]:
    """Record types and ranks that inference could not find, from one run of the float model."""
    try:
        reusable = feeds is not None and feeds.reusable
        feed = next(iter(feeds or ())) if reusable else synthetic_feeds(graph, {}, 1, seed)[0]
        model, folder = write_model.with_external_weights(graph)
        tapped = write_model.save_proto(session.with_outputs(model, unknown), folder)
        types = session.record_types(tapped, feed)
    except (DataError, ModelError) as e:
        return [Note("types-unknown", f"{len(unknown)} tensors have no known type: {e}")]
    tensors = graph.tensors()
    for name, (dtype, rank) in types.items():
        tensors[name].dtype = np.dtype(dtype)
        tensors[name].shape = tensors[name].shape or [None] * rank
    return []
