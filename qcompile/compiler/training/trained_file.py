"""The trained module against the file that was written, on all texts of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qcompile.compiler.report.records import TrainingAccount, TrainingMetric
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.prepare import Prepared
from qcompile.compiler.stages.saturation_check import Runner
from qcompile.compiler.stages.train import FLOAT_LIMIT, Learned, session_options
from qcompile.compiler.stages.verify import Verified, compiled_runner
from qcompile.quant import Array
from qcompile.runtime.evaluation.agreement import Agreement, Run, agree
from qcompile.runtime.session import Session

if TYPE_CHECKING:
    from qcompile.training.labelled.labelled_data import Batch

_MOVED_BATCHES = 16
_SPREAD = 2.0  # how far two draws of the same rounding noise may be apart, as a ratio of RMS


@dataclass(frozen=True)
class Compared:
    """The account with what was measured on the file, and the gates that failed."""

    account: TrainingAccount
    failures: tuple[str, ...] = ()


def compare(verified: Verified) -> Compared | None:
    """Run the float model, the trained module and the file; None without training.

    Nothing is run where verification is switched off.
    """
    learned, prepared = verified.rewritten.learned, verified.prepared
    if learned is None:
        return None
    if not prepared.options.verify:
        return Compared(learned.account)
    sums = verified.rewritten.sums
    runner = compiled_runner(prepared, sums, saturation_check.EXACT, float_data=True)
    return _compare(learned, prepared, runner)


def _compare(learned: Learned, prepared: Prepared, runner: Runner) -> Compared:
    sweep = _Sweep(learned, prepared, runner)
    with prepared.stopwatch.stage("compare with torch"):
        found = agree(sweep.runs(), 0.0)
        moved = agree(sweep.moved, 0.0)
    limit = _SPREAD * moved.rms + FLOAT_LIMIT
    # An argmax may lose a lead that rounding was seen to take, here or on another text.
    margin = _SPREAD * moved.lead_change + 2 * FLOAT_LIMIT
    found = replace(found, limit=limit, margin_limit=margin)
    metric = sweep.metric(learned.account.curve[0].metric)
    account = replace(learned.account, agreement=found, metric=metric)
    failures = [*dropped(metric), *_different(found)]
    return Compared(account, tuple(failures))


def dropped(metric: TrainingMetric) -> Iterator[str]:
    most = metric.max_drop
    if most is not None and not metric.drop <= most:
        yield (
            f"{metric.name} is {metric.compiled:.2f}, {metric.drop:.2f} points below the float "
            f"model's {metric.float:.2f} (--max-drop {most:g}); calibration alone gives "
            f"{metric.calibrated:.2f}: train longer, or give the model more bits"
        )


class _Sweep:
    """One pass over the evaluation, in which all forms of the model run on the same texts."""

    def __init__(self, learned: Learned, prepared: Prepared, runner: Runner) -> None:
        from qcompile.training.labelled.metrics import Meter

        evaluation = learned.evaluation
        self.learned, self.prepared, self.runner = learned, prepared, runner
        self.session = Session(prepared.float_model.running, session_options(prepared))
        labelled = evaluation.labelled
        self.float, self.trained, self.compiled = (
            Meter(evaluation.task, labelled=labelled) for _ in range(3)
        )
        self.flips = Flips()
        self.moved: list[Run] = []  # the module against itself, rounded elsewhere

    def runs(self) -> Iterator[Run]:
        """What the module and the file answer, with the meters brought up to date."""
        from qcompile.training.inference import rounded_elsewhere, run_module

        learned = self.learned
        self.prepared.progress.step("compare with torch", learned.evaluation.steps)
        for number, batch in enumerate(learned.evaluation.ordered()):
            expected = run_module(learned.module, batch.feed)
            found = self.runner.run(batch.feed)
            reference = self.session.run(batch.feed)
            self._measure(batch, reference, expected, found)
            if number < _MOVED_BATCHES:
                with rounded_elsewhere(learned.quantizers, number):
                    self.moved.append(
                        (expected, run_module(learned.module, batch.feed), batch.feed)
                    )
            self.prepared.progress.advance()
            yield expected, found, batch.feed

    def _measure(self, batch: Batch, *answers: dict[str, Array]) -> None:
        """Add the float model's, the module's and the file's answers to their meters."""
        learned = self.learned
        own, name = slice(batch.count), learned.objective.output
        targets = None if batch.targets is None else batch.targets[own]
        meters = self.float, self.trained, self.compiled
        for meter, found in zip(meters, answers, strict=True):
            teacher = None if targets is not None else answers[0][name][own]
            meter.update(found[name][own], batch.mask[own], targets, teacher)
        if learned.evaluation.task.kind in ("classification", "tokens"):
            self.flips.update(answers[0][name][own], answers[-1][name][own], batch.mask[own])

    def metric(self, calibrated: float) -> TrainingMetric:
        scores = [meter.score() for meter in (self.float, self.trained, self.compiled)]
        before, trained, compiled = (score.value for score in scores)
        options = self.prepared.options.training
        assert options is not None
        labelled = self.learned.evaluation.labelled
        return TrainingMetric(
            name=scores[0].metric,
            samples=len(self.learned.evaluation),
            float=before,
            calibrated=calibrated,
            trained=trained,
            compiled=compiled,
            drop=before - compiled,
            max_drop=options.max_drop if labelled else None,
            flips=self.flips.share,
        )


@dataclass
class Flips:
    """Counts decisions for another class than the float model's."""

    decisions: int = 0
    flipped: int = 0

    def update(self, reference: Array, found: Array, mask: Array) -> None:
        """Add logits, [rows, classes] or [rows, width, classes] of tokens.

        mask: bool [rows, width], False for padding.
        """
        changed = reference.argmax(-1) != found.argmax(-1)
        if changed.ndim == 2:
            changed = changed[mask]
        self.decisions += changed.size
        self.flipped += int(changed.sum())

    @property
    def share(self) -> float | None:
        """Of the decisions; None without any."""
        return self.flipped / self.decisions if self.decisions else None


def _different(found: Agreement) -> Iterator[str]:
    if not found.holds:
        yield f"the file is not what was trained: torch and the compiled model {found}"
