"""The report of a compilation, from the outcomes of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qcompile.compiler.cluster.account import ClusterAccount
from qcompile.compiler.report import ledger
from qcompile.compiler.report.next_steps import next_steps
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import (
    Forecast,
    SearchAccount,
    SizeAccount,
    TrainingAccount,
    TuningAccount,
)
from qcompile.compiler.report.report import Report
from qcompile.compiler.stages.bench import Timed
from qcompile.compiler.stages.verify import Verified
from qcompile.runtime.memory_budget import LIBRARIES


def build_report(
    verified: Verified,
    timed: Timed,
    forecast: Forecast | None,
    *,
    search: SearchAccount | None,
    sizes: SizeAccount | None,
    tuning: TuningAccount | None,
    training: TrainingAccount | None,
    cluster: ClusterAccount | None,
    notes: Sequence[Note],
    failures: Sequence[str],
) -> Report:
    """``notes`` and ``failures`` are those of searches, the tuner, the lock and the cache."""
    prepared, rewritten = verified.prepared, verified.rewritten
    model, compiled, watch = prepared.float_model, rewritten.compiled, prepared.stopwatch
    all_notes = (
        *prepared.notes,
        *rewritten.calibrated.notes,
        *rewritten.notes,
        *verified.notes,
        *notes,
        *timed.notes,
        *over_budget(prepared.budget.limit, watch.memory),
    )
    report = Report(
        source=prepared.request.name or prepared.request.source,
        target=prepared.target.name,
        mode=prepared.mode,
        recipe=prepared.recipe,
        digest=prepared.recipe.digest(),
        pipeline=rewritten.pipeline.text,
        gates=prepared.gates,
        passes=rewritten.passes,
        skips=rewritten.skips,
        ledger=verified.ledger,
        calibration=rewritten.calibrated.account,
        search=search,
        sizes=sizes,
        tuning=tuning,
        training=training,
        cluster=cluster,
        float_bytes=model.size,
        float_content=model.content,
        bytes=compiled.size,
        model_sha256=compiled.sha256,
        operators=verified.operators,
        int8_products=ledger.count_activation_matmuls(compiled.parsed[0]),
        provider_missing=prepared.provider if prepared.provider_missing else None,
        requirements=rewritten.requirements,
        saturation=verified.saturation,
        verdict=verified.verdict,
        forecast=forecast,
        speed=timed.speed,
        profile=list(timed.profile),
        channels=rewritten.channels,
        notes=list(all_notes),
        failures=[*verified.failures, *failures, *timed.failures],
        seconds=watch.seconds,
        memory=watch.memory,
    )
    return replace(report, next_steps=next_steps(report))


def over_budget(limit: int | None, memory: dict[str, int]) -> list[Note]:
    """A note where a stage took more than the budget and the libraries: the estimate was wrong."""
    stage = next((n for n, m in memory.items() if limit and m > limit + LIBRARIES), None)
    if stage is None:
        return []
    text = (
        f"{stage} took {memory[stage]} bytes of memory, over --max-memory {limit} and the "
        f"{LIBRARIES} of the libraries"
    )
    return [Note("over-memory", text)]
