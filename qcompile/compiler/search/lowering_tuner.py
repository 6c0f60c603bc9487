"""Times the target's lowering options on this machine, on the data's shapes, and keeps the fastest.

For one lowering option after another, each other choice is compiled and timed against the best so
far, in alternating rounds. It is kept if the whole interval of their ratio is below 1 by a margin,
so that noise decides nothing. The resulting recipe builds the same model again without timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcompile.compiler.config import lowering_options
from qcompile.compiler.config import recipe as recipes
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import Trial, TuningAccount
from qcompile.compiler.report.report import Report
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.bench import largest_feed
from qcompile.compiler.stages.rewrite import Rewritten
from qcompile.compiler.stages.verify import Verified
from qcompile.data.feeds import Feed
from qcompile.ir import Refusal
from qcompile.ir.printer import dump
from qcompile.runtime import latency
from qcompile.system import atomic_write
from qcompile.targets.target import LoweringOption

# A choice must be at least one percent faster: less is not worth a special recipe.
_BELOW = 0.99
_TIMING = latency.TimingOptions(rounds=8, seconds=0.25)

Rewrite = Callable[[Recipe], Rewritten]


@dataclass(frozen=True)
class Tuned:
    """The build with the fastest choices; ``account`` is for the report, None if none was tried."""

    verified: Verified
    account: TuningAccount | None = None
    notes: tuple[Note, ...] = ()


def tune_lowering(first: Verified, rewrite: Rewrite, build: Callable[[Recipe], Verified]) -> Tuned:
    """Try each other choice of lowering; ``first`` if none is faster, or it fails the gates.

    ``rewrite`` compiles a recipe, ``build`` also verifies. Raises what compiling does.
    """
    obstacle = _obstacle(first)
    if obstacle is not None:
        return Tuned(first, notes=(Note("not-tuned", obstacle.about("not tuned").reason),))
    best, trials = _fastest(first, rewrite)
    verified = first if best == first.prepared.recipe else build(best)
    tried = "lowering options tried: " + "; ".join(map(describe_trial, trials))
    notes = [Note("tuned", tried)] if trials else []
    if verified.failures and not first.failures:
        text = f"the faster lowering options are not used: {verified.failures[0]}"
        verified, notes = first, [*notes, Note("faster-refused", text)]
    shapes = {name: list(value.shape) for name, value in largest_feed(first.feeds).items()}
    return Tuned(verified, TuningAccount(shapes, trials), tuple(notes))


def _obstacle(first: Verified) -> Refusal | None:
    """Why nothing can be tuned, None where it can."""
    prepared = first.prepared
    if not prepared.target.forms:
        return Refusal(f"target {prepared.target.name!r} has no other lowering options")
    if prepared.provider_missing:
        return Refusal(f"{prepared.target.provider} is not installed here")
    if prepared.recipe.pipeline:
        return Refusal("the recipe's own pipeline fixes all passes")
    if not first.feeds:
        return Refusal("there are no inputs to time with, give --data")
    if prepared.feeds is not None and prepared.reusable_feeds is None:
        return Refusal("the data can be read once only, give a list or a file")
    return None


def _fastest(first: Verified, rewrite: Rewrite) -> tuple[Recipe, list[Trial]]:
    """The recipe with the fastest choices, and all trials."""
    prepared, feed = first.prepared, largest_feed(first.feeds)
    trials: list[Trial] = []
    best = first.rewritten
    for option in prepared.target.forms:
        recipe = best.prepared.recipe
        others = lowering_options.other_recipes(prepared.target, prepared.mode, option, recipe)
        for choice, other in others:
            prepared.progress.step(f"tune: {option.name} {choice}", _TIMING.rounds)
            candidate = rewrite(other)
            # The files differ in any case: each has the digest of its recipe.
            if dump(candidate.prepared.graph) == dump(best.prepared.graph):
                trials.append(Trial(option.name, choice, None, None, None, kept=False))
                continue
            trials.append(_trial(option, choice, best, candidate, feed))
            if trials[-1].kept:
                best = candidate
    return best.prepared.recipe, trials


def _trial(
    option: LoweringOption, choice: str, best: Rewritten, candidate: Rewritten, feed: Feed
) -> Trial:
    prepared = candidate.prepared
    labelled = [("best so far", best.compiled.path), (choice, candidate.compiled.path)]
    options = latency.TimingOptions(
        prepared.options.threads,
        _TIMING.rounds,
        _TIMING.seconds,
        provider=prepared.provider,
        exact=saturation_check.saturating_here(labelled, prepared.provider),
    )
    ratio = latency.compare_latency(labelled, feed, options, prepared.progress.advance).ratio(1)
    kept = ratio.high < _BELOW
    return Trial(option.name, choice, ratio.median, ratio.low, ratio.high, kept)


def tuned_recipe_yaml(report: Report, tuning: TuningAccount) -> str:
    """The recipe of a tuned build as YAML, with the machine and the shapes of the timing."""
    about = report.environment
    where = f"{', '.join(about.isa)}, onnxruntime {about.onnxruntime}"
    shapes = ", ".join(f"{n} {s}" for n, s in tuning.shapes.items())
    kept = {
        t.form: f"{1 / t.ratio:.2f} times as fast"
        for t in tuning.trials
        if t.kept and t.ratio is not None
    }
    heading = (f"tuned for {report.source} on {where}", f"shapes: {shapes}")
    return recipes.recipe_yaml(report.recipe, heading, kept)


def tuned_file(model: Path) -> Path:
    """The file of a tuned build's recipe."""
    return model.with_name(f"{model.stem}.recipe.yaml")


def save_tuned(report: Report, model: Path) -> None:
    """Write the recipe with the fastest lowering options, if any were timed. Raises OutputError."""
    if report.tuning is not None:
        text = tuned_recipe_yaml(report, report.tuning)
        atomic_write.write_atomic(tuned_file(model), text.encode())


def describe_trial(trial: Trial) -> str:
    """One trial in words."""
    if trial.ratio is None:
        return f"{trial.form} {trial.choice}: the same graph"
    speed = f"{1 / trial.ratio:.2f} times as fast"
    return f"{trial.form} {trial.choice}: {speed}{', kept' if trial.kept else ''}"
