"""A model planned, calibrated and transformed, with a switch for each of its quantizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qcompile.compiler.report.notes import Note
from qcompile.compiler.search import fake_quantized, precision_candidates
from qcompile.compiler.search.precision_candidates import By, Origin, PrecisionCandidate
from qcompile.compiler.search.sensitivity import Meter
from qcompile.compiler.stages.calibrate import Calibrated, calibrate
from qcompile.compiler.stages.pipelines import pipeline_of
from qcompile.compiler.stages.prepare import Prepared
from qcompile.compiler.stages.rewrite import context_of, run_passes, why_float
from qcompile.errors import DataError, TargetError
from qcompile.ir import Graph, has_subgraph
from qcompile.ir.analysis import prequantized
from qcompile.planning import Context, Use
from qcompile.quant import QSpec
from qcompile.rewriting.instruments import Verify
from qcompile.runtime.session import SessionOptions
from qcompile.targets import instruction_sets


@dataclass(frozen=True)
class PlannedWeight:
    """A weight as it was planned: its name, how it is quantized, how many values it has, and how
    many bits each takes in the file: targets may have no type of as many bits as the code's."""

    name: str
    spec: QSpec
    elements: int
    stored: int


@dataclass(frozen=True)
class Measurable:
    """``prepared`` was stopped before insertion; its graph became the model in ``meter``.

    ``origins``: names and roles of planned uses. ``weights``: those of them that read a weight.
    ``came_quantized``: operators of the input model
    with integers of its own, empty if it has none.
    """

    prepared: Prepared
    calibrated: Calibrated
    ctx: Context
    meter: Meter
    origins: Mapping[Use, Origin]
    weights: Mapping[Use, PlannedWeight]
    came_quantized: str = ""

    @property
    def notes(self) -> tuple[Note, ...]:
        notes = *self.prepared.notes, *self.calibrated.notes
        if not (self.came_quantized and instruction_sets.saturating(self.prepared.recipe.isa)):
            return notes
        text = (
            f"errors are those of exact sums: the input model has {self.came_quantized}, whose "
            "sums may saturate on x86 without VNNI (qcompile verify shows both)"
        )
        return (*notes, Note("exact-sums", text))

    def items(self, by: By = "tensor") -> list[PrecisionCandidate]:
        """What to measure, grouped. Raises RecipeError where the target allows no such groups."""
        return precision_candidates.group_switches(
            self.ctx, self.meter.model.switches, self.origins, by
        )


def planned_weights(prepared: Prepared) -> dict[str, PlannedWeight]:
    """The quantized weights by name, from a run of the pipeline that ends with the plan."""
    ctx, pipeline = context_of(prepared), pipeline_of(prepared)
    run_passes(prepared, ctx, pipeline.planning, [], "simplify and plan")
    return {weight.name: weight for weight in _weights(prepared.graph, ctx).values()}


def _weights(graph: Graph, ctx: Context) -> dict[Use, PlannedWeight]:
    found = {}
    for decision in ctx.plan.quantized("weight"):
        spec = decision.spec
        assert spec is not None  # quantized() yields no other
        for use in decision.uses:
            constant = graph.find(use.node).inputs[use.index]
            count = math.prod(constant.shape or ())
            stored = ctx.target.few_bits.get(spec.width or 0)
            bits = spec.bits if stored is None else stored.stored
            found[use] = PlannedWeight(decision.tensor, spec, count, bits)
    return found


def measurable(prepared: Prepared) -> Measurable:
    """Run the pipeline up to insertion, and build the fake-quantized model in its stead.

    Raises DataError where no feeds are held out, TargetError where nothing is quantized.
    """
    graph, checks = prepared.graph, [Verify()]
    came_quantized = prequantized.inventory(graph)
    ctx, pipeline = context_of(prepared, may_widen=True), pipeline_of(prepared)
    run_passes(prepared, ctx, pipeline.planning, checks, "simplify and plan")
    origins = precision_candidates.record_origins(graph, ctx)
    weights = _weights(graph, ctx)
    calibrated = calibrate(prepared, ctx, pipeline)
    exact = pipeline.exact_transforms
    run_passes(prepared, ctx, exact, checks, "transform")
    float_linears = fake_quantized.record_float_linears(graph, ctx)
    run_passes(prepared, ctx, pipeline.transforms[len(exact) :], checks, "transform")
    feeds, switches = calibrated.held_out.feeds, fake_quantized.make_switches(ctx)
    if not feeds:
        raise DataError("no feeds are held out to measure on: give more data")
    if not switches:
        inside = any(has_subgraph(node) for node in graph.nodes)
        why = "bodies of If, Loop and Scan are not ranked" if inside else why_float(ctx)
        raise TargetError(f"nothing is quantized, so nothing can be ranked: {why}")
    meter = Meter(
        fake_quantized.build_fake_quantized(graph, ctx, switches, float_linears),
        prepared.float_model.running,
        feeds,
        prepared.gates,
        prepared.options.metric,
        SessionOptions(prepared.options.threads, provider=prepared.ranking_provider, tf32=False),
        prepared.budget.divisible,
        prepared.selection,
        padding=prepared.recipe.keep_padding_rows,
        external=prepared.float_model.running_external,
    )
    return Measurable(prepared, calibrated, ctx, meter, origins, weights, came_quantized)
