"""The stages that change the graph: simplify to lower, then bodies, write."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcompile import __version__
from qcompile.compiler.config import lowering_options
from qcompile.compiler.report import ledger
from qcompile.compiler.report.channel_views import ChannelSite, ChannelWatch
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.notes import NOTHING_QUANTIZED, Note, coded_note
from qcompile.compiler.stages import saturation_check, train
from qcompile.compiler.stages.calibrate import Calibrated, calibrate
from qcompile.compiler.stages.models import CompiledModel, body_constants
from qcompile.compiler.stages.pipelines import Pipeline, pipeline_of
from qcompile.compiler.stages.prepare import Prepared
from qcompile.ir import Graph, is_onnx_domain, lazy_values
from qcompile.ir.analysis import prequantized
from qcompile.ir.model_io import write_model
from qcompile.planning import Context, PassSettings, PrecisionRule, Skip
from qcompile.planning.context import Reasons
from qcompile.rewriting import Pass
from qcompile.rewriting.bodies import BodyCompiler
from qcompile.rewriting.instruments import Dump, Instrument, PassRecord, Time, Verify
from qcompile.rewriting.pass_manager import PassManager
from qcompile.runtime import session
from qcompile.system import threads
from qcompile.system.memory import release_memory
from qcompile.targets import requirements, runtime_versions

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewritten:
    """A model that is compiled and written, not yet verified.

    quantized: at least one tensor is. brought: the input model has integers of its own.
    requirements: number of nodes that each rule of the target was checked on. channels: the inputs
    of linear layers before and after the transforms. learned: None without training.
    """

    prepared: Prepared
    calibrated: Calibrated
    pipeline: Pipeline
    compiled: CompiledModel
    sums: saturation_check.IntegerSums
    ledger: list[LedgerRow]
    passes: list[PassRecord]
    skips: list[Skip]
    requirements: dict[str, int]
    channels: list[ChannelSite]
    quantized: bool
    brought: bool = False
    learned: train.Learned | None = None
    notes: tuple[Note, ...] = ()

    @property
    def brought_alone(self) -> bool:
        """True where all integers came with the model, whose own sums saturate where these do."""
        return self.brought and not self.quantized


def rewrite(prepared: Prepared, reasons: Reasons | None = None) -> Rewritten:
    """Run the pipeline, calibrate between the plan and the transforms, and write the result.

    ``reasons``: by pattern of ``precision``, for patterns that a search added to the recipe.
    """
    ctx, pipeline = context_of(prepared, reasons), pipeline_of(prepared)
    timer, watch, graph = Time(), ChannelWatch(), prepared.graph
    instruments: list[Instrument] = [Verify(), timer]
    if prepared.options.dump_dir is not None:
        instruments.insert(0, Dump(prepared.options.dump_dir))  # before a check can stop the run
    came_quantized = _came_quantized(prepared)
    run_passes(prepared, ctx, pipeline.planning, instruments, "simplify and plan")
    calibrated = calibrate(prepared, ctx, pipeline)
    run_passes(prepared, ctx, pipeline.transforms, [*instruments, watch], "transform")
    ctx.channels.clear()  # samples are large, and no later pass reads them
    learned = None
    if prepared.options.training is not None:
        learned = train.train(prepared, ctx, pipeline, calibrated)
    run_passes(prepared, ctx, pipeline.lowering, instruments, "quantize and lower")
    ctx.rounded.clear()  # they are constants of the graph now
    with prepared.stopwatch.stage("bodies"), threads.one_thread():
        BodyCompiler(pipeline.bodies).run(graph, ctx)
    graph.merge_weights(transposed=True)
    graph.sort()
    quantized = any(ctx.plan.quantized())
    float_throughout = not quantized and prepared.mode != "float"
    stayed_float = _stayed_float(ctx, came_quantized) if float_throughout else []
    checked = requirements.require(graph, prepared.target.name, prepared.target.requires)
    compiled, sums = _written(prepared, _weight_bytes(graph, ctx))
    return Rewritten(
        prepared,
        calibrated,
        pipeline,
        compiled,
        sums,
        ledger=ledger.ledger_rows(compiled.parsed[0], compiled.size, ctx),
        passes=timer.records,
        skips=ctx.skips,
        requirements=checked.checked,
        channels=watch.sites(),
        quantized=quantized,
        brought=bool(came_quantized),
        learned=learned,
        notes=(
            *came_quantized,
            *stayed_float,
            *_without_effect(prepared, ctx),
            *(() if learned is None else learned.notes),
            *(Note(code, text) for code, text in ctx.remarks.items()),
            *(Note("requirement", text) for text in checked.remarks),
            *_needed_runtime(prepared, compiled),
        ),
    )


def _weight_bytes(graph: Graph, ctx: Context) -> dict[str, int]:
    """Bytes of constants by their names in the input model.

    Without those that were computed from small ones, and what passes derived from these: their
    names begin with the name of what they came from.
    """
    sizes = body_constants(graph)
    generated = tuple(f"{name}/" for name in ctx.generated)
    for name, constant in graph.constants().items():
        origin, _ = ctx.origins.get(name, (name, None))
        if not f"{origin}/".startswith(generated):
            sizes[origin] += lazy_values.nbytes(constant)
    return sizes


def context_of(
    prepared: Prepared, reasons: Reasons | None = None, *, may_widen: bool = False
) -> Context:
    """What passes share; ``may_widen``: a search may raise tensors to 16 bits later."""
    recipe, graph = prepared.recipe, prepared.graph
    own = not (recipe.transforms or recipe.pipeline)  # with the target's own outlier handling
    attention = lowering_options.chosen_attention(prepared.choices) or recipe.attention
    reasons = reasons or {}
    settings = PassSettings(
        mode=prepared.mode,
        keep_float=recipe.keep_float,
        seed=recipe.seed,
        precision=tuple(PrecisionRule(p, bits, reasons.get(p)) for p, bits in recipe.precision),
        may_widen=may_widen,
        attention=attention or (prepared.target.attention if own else "float"),
        weight_bits=recipe.weight_bits,
        embedding_bits=recipe.embedding_bits,
        weight_block=recipe.weight_block,
    )
    ctx = Context(prepared.target, session.evaluate, settings)
    names = *(n.name for n in graph.nodes), *graph.tensors(), *graph.inner_names()
    ctx.original_names = frozenset(names)
    return ctx


def run_passes(
    prepared: Prepared,
    ctx: Context,
    passes: Sequence[Pass],
    instruments: Sequence[Instrument],
    what: str,
) -> None:
    """Run passes over the graph; ``what`` names the stage in progress and timings."""
    prepared.progress.step(what, len(passes))
    with prepared.stopwatch.stage(what), threads.one_thread():
        manager = PassManager(tuple(passes), instruments)

        def done(name: str) -> None:
            _LOG.debug("pass %s", name)
            prepared.progress.advance()

        manager.run(prepared.graph, ctx, done)


def why_float(ctx: Context) -> str:
    """The most common reason among the weights of a model that stayed float."""
    reasons = Counter(d.reason for d in ctx.plan.decisions if d.kind == "weight")
    reasons.update(s.reason for s in ctx.skips if s.pass_name == "plan-operands")
    if not reasons:
        return f"target {ctx.target.name!r} has no rule that fits this model"
    return reasons.most_common(1)[0][0]


def _came_quantized(prepared: Prepared) -> list[Note]:
    operators = prequantized.inventory(prepared.graph)
    if not operators:
        return []
    before = prequantized.compiled_before(prepared.graph)
    text = (
        f"the input model is already quantized{before}: {operators} keep their integers and scales"
    )
    return [Note("came-quantized", text)]


def _stayed_float(ctx: Context, came_quantized: Iterable[Note]) -> list[Note]:
    """The note that nothing was quantized; none where all that could be came in integers."""
    why = why_float(ctx)
    if came_quantized and why == prequantized.IN_INPUT:
        return []
    except_for = "except for what was already quantized, " if came_quantized else ""
    return [coded_note(NOTHING_QUANTIZED, f"{except_for}{why}")]


def _needed_runtime(prepared: Prepared, compiled: CompiledModel) -> list[Note]:
    """The note that the file needs a newer onnxruntime than qcompile does.

    Raises OldRuntimeError if the installed one is too old, since it could not verify the file.
    """
    feature = runtime_versions.newest_feature(
        compiled.parsed[0], prepared.target.provider, session.version(), "the compiled model"
    )
    if feature is None:
        return []
    text = f"the file needs onnxruntime {feature.version} or later: it has {feature.name}"
    return [Note("oldest-runtime", text)]


def _without_effect(prepared: Prepared, ctx: Context) -> Iterator[Note]:
    """Notes on settings of few bits that changed nothing, where ``plan-operands`` does not look."""
    recipe, decisions = prepared.recipe, ctx.plan.decisions
    bits_of = {"weight_bits": recipe.weight_bits, "embedding_bits": recipe.embedding_bits}
    for name, bits in bits_of.items() if prepared.mode == "float" else ():
        if bits is not None:
            text = f"{name} {bits} has no effect: mode float quantizes nothing"
            yield Note(f"{name.replace('_', '-')}-unused", text)
    if recipe.weight_block and not any(d.spec is not None and d.spec.block for d in decisions):
        text = (
            f"weight_block {recipe.weight_block} has no effect: no weight has 2 to 7 bits "
            "(weight_bits, embedding_bits or precision give them)"
        )
        yield Note("weight-block-unused", text)


def _written(
    prepared: Prepared, weights: dict[str, int]
) -> tuple[CompiledModel, saturation_check.IntegerSums]:
    """Write the graph, with its origin and the session option that it needs in the metadata.

    The option follows from what is written, so a file that needs one is written twice.

    In mode float, types that shape inference finds are left out: the file is to be no larger.
    Except on targets that compute in 16 bits, since the emulation of float16 reads them.
    """
    standard = all(is_onnx_domain(node) for node in prepared.graph.nodes)
    halved = bool(prepared.target.halves) or prepared.recipe.float16
    inferred = prepared.mode == "float" and standard and not halved
    prepared.graph.header.inner_types = not inferred
    metadata = prepared.graph.header.metadata
    metadata.pop(saturation_check.METADATA, None)  # of an input that was compiled before
    metadata.update(
        {
            "qcompile.version": __version__,
            "qcompile.recipe": prepared.recipe.digest(),
            "qcompile.target": prepared.target.name,
        }
    )
    files = write_model.write_model(prepared.graph, prepared.options.stem)
    release_memory()
    with prepared.stopwatch.stage("saturation"):
        sums = saturation_check.IntegerSums(
            files.path, prepared.recipe.isa, prepared.target.provider
        )
    if sums.needed_option:
        metadata[saturation_check.METADATA] = sums.needed_option
        files = write_model.write_model(prepared.graph, prepared.options.stem)
        sums = sums.of_copy(files.path)
    return CompiledModel(files, weights), sums
