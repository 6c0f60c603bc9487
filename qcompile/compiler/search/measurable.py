"""A model planned, calibrated and transformed, with a switch for each of its quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qcompile.compiler.report.notes import Note
from qcompile.compiler.search import fake_quantized, lift_items
from qcompile.compiler.search.lift_items import By, Origin, PrecisionCandidate
from qcompile.compiler.search.sensitivity import Meter
from qcompile.compiler.stages.calibrate import Calibrated, calibrate
from qcompile.compiler.stages.pipelines import pipeline_of
from qcompile.compiler.stages.prepare import Prepared
from qcompile.compiler.stages.rewrite import context_of, run, why_float
from qcompile.errors import DataError, TargetError
from qcompile.planning import Context, Use
from qcompile.rewriting.instruments import Verify
from qcompile.runtime.session import SessionOptions


@dataclass(frozen=True)
class Measurable:
    """``prepared`` was stopped before insertion, its graph is spent: the switches are in ``meter``.

    ``known``: names and roles of planned uses.
    """

    prepared: Prepared
    calibrated: Calibrated
    ctx: Context
    meter: Meter
    known: Mapping[Use, Origin]

    @property
    def notes(self) -> tuple[Note, ...]:
        return (*self.prepared.notes, *self.calibrated.notes)

    def items(self, by: By = "tensor") -> list[PrecisionCandidate]:
        """What to measure, grouped. Raises RecipeError where the target allows no such groups."""
        return lift_items.items(self.ctx, self.meter.switched.switches, self.known, by)


def measurable(prepared: Prepared) -> Measurable:
    """Run the pipeline up to insertion, and build the fake-quantized model in its stead.

    Raises DataError where no feeds are left to measure on, TargetError where nothing is quantized.
    """
    graph, checks = prepared.graph, [Verify()]
    ctx, pipeline = context_of(prepared, may_widen=True), pipeline_of(prepared)
    run(prepared, ctx, pipeline.planning, checks, "simplify and plan")
    known = lift_items.origins(graph, ctx)
    calibrated = calibrate(prepared, ctx, pipeline)
    exact = pipeline.exact_transforms
    run(prepared, ctx, exact, checks, "transform")
    plain = fake_quantized.plain_forms(graph, ctx)
    run(prepared, ctx, pipeline.transforms[len(exact) :], checks, "transform")
    feeds, found = calibrated.held_out.feeds, fake_quantized.switches(ctx)
    if not feeds:
        raise DataError("no feeds are left to measure on: give more data")
    if not found:
        raise TargetError(f"nothing is quantized, so nothing can be ranked: {why_float(ctx)}")
    meter = Meter(
        fake_quantized.build(graph, ctx, found, plain),
        prepared.float_model.running,
        feeds,
        prepared.gates,
        prepared.options.metric,
        SessionOptions(prepared.options.threads, provider=prepared.provider),
        prepared.budget.divisible,
    )
    return Measurable(prepared, calibrated, ctx, meter, known)
