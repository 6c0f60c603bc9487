"""Times the target's forms on this machine, in the shape of the data, and keeps the faster ones.

Form by form, each other way is compiled and timed beside the best so far, in alternating rounds; it
is kept where the whole interval of their ratio is below 1 by a margin, so that noise decides
nothing. The recipe with the winners builds the same model again without timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qcompile.compiler.config import lowering_forms
from qcompile.compiler.config import recipe as recipes
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import Trial, TuningAccount
from qcompile.compiler.report.report import Report
from qcompile.compiler.stages.bench import largest
from qcompile.compiler.stages.rewrite import Rewritten
from qcompile.compiler.stages.verify import Verified
from qcompile.data.feeds import Feed
from qcompile.ir import Refusal
from qcompile.ir.printer import dump
from qcompile.runtime import latency
from qcompile.targets.target import LoweringOption

# A way must be faster by one percent at least: less is not worth a recipe of one's own.
_BELOW = 0.99
_TIMING = latency.TimingOptions(rounds=8, seconds=0.25)

Rewrite = Callable[[Recipe], Rewritten]


@dataclass(frozen=True)
class Tuned:
    """The build with the fastest forms; ``account`` for the report, None where none were tried."""

    verified: Verified
    account: TuningAccount | None = None
    notes: tuple[Note, ...] = ()


def tune(first: Verified, rewrite: Rewrite, build: Callable[[Recipe], Verified]) -> Tuned:
    """Try each other way of lowering; ``first`` where none is faster, or the gates refuse it.

    ``rewrite`` compiles a recipe, ``build`` also verifies. Raises what compiling does.
    """
    obstacle = _obstacle(first)
    if obstacle is not None:
        return Tuned(first, notes=(Note("not-tuned", obstacle.about("not tuned").reason),))
    best, trials = _fastest(first, rewrite)
    made = first if best == first.prepared.recipe else build(best)
    tried = "forms tried: " + "; ".join(map(told, trials))
    notes = [Note("tuned", tried)] if trials else []
    if made.failures and not first.failures:
        text = f"the faster forms are not taken: {made.failures[0]}"
        made, notes = first, [*notes, Note("faster-refused", text)]
    shapes = {name: list(value.shape) for name, value in largest(first.feeds).items()}
    return Tuned(made, TuningAccount(shapes, trials), tuple(notes))


def _obstacle(first: Verified) -> Refusal | None:
    """Why nothing can be tuned, None where it can."""
    prepared = first.prepared
    if not prepared.target.forms:
        return Refusal(f"target {prepared.target.name!r} has one form of everything")
    if prepared.provider_missing:
        return Refusal(f"{prepared.target.provider} is not installed here")
    if prepared.recipe.pipeline:
        return Refusal("a pipeline is all there is")
    if not first.feeds:
        return Refusal("there are no inputs to time with, give --data")
    if prepared.feeds is not None and prepared.reusable_feeds is None:
        return Refusal("the data can be read once only, give a list or a file")
    return None


def _fastest(first: Verified, rewrite: Rewrite) -> tuple[Recipe, list[Trial]]:
    """The recipe with the fastest forms, and what was tried."""
    prepared, feed = first.prepared, largest(first.feeds)
    trials: list[Trial] = []
    best = first.rewritten
    for form in prepared.target.forms:
        recipe = best.prepared.recipe
        for name, other in lowering_forms.others(prepared.target, prepared.mode, form, recipe):
            prepared.progress.step(f"tune: {form.name} {name}", _TIMING.rounds)
            made = rewrite(other)
            # The files differ in any case: each has the digest of its recipe.
            if dump(made.prepared.graph) == dump(best.prepared.graph):
                trials.append(Trial(form.name, name, None, None, None, kept=False))
                continue
            trials.append(_trial(form, name, best, made, feed))
            if trials[-1].kept:
                best = made
    return best.prepared.recipe, trials


def _trial(form: LoweringOption, name: str, best: Rewritten, made: Rewritten, feed: Feed) -> Trial:
    prepared = made.prepared
    options = latency.TimingOptions(
        prepared.options.threads, _TIMING.rounds, _TIMING.seconds, provider=prepared.provider
    )
    labelled = [("best so far", best.compiled.path), (name, made.compiled.path)]
    ratio = latency.compare_latency(labelled, feed, options, prepared.progress.advance).ratio(1)
    kept = ratio.high < _BELOW
    return Trial(form.name, name, ratio.median, ratio.low, ratio.high, kept)


def to_yaml(report: Report, tuning: TuningAccount) -> str:
    """The recipe of a tuned build as a file, with where and in which shapes it was timed."""
    about = report.environment
    where = f"{', '.join(about.isa)}, onnxruntime {about.onnxruntime}"
    shapes = ", ".join(f"{n} {s}" for n, s in tuning.shapes.items())
    kept = {
        t.form: f"{1 / t.ratio:.2f} times as fast"
        for t in tuning.trials
        if t.kept and t.ratio is not None
    }
    heading = (f"tuned for {report.source} on {where}", f"shapes: {shapes}")
    return recipes.to_yaml(report.recipe, heading, kept)


def told(trial: Trial) -> str:
    """One trial in words."""
    if trial.ratio is None:
        return f"{trial.form} {trial.choice}: the same graph"
    speed = f"{1 / trial.ratio:.2f} times as fast"
    return f"{trial.form} {trial.choice}: {speed}{', kept' if trial.kept else ''}"
