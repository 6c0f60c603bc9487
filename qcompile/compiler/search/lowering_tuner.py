"""Times the target's forms on this machine, in the shape of the data, and keeps the faster ones.

Form by form, each other way is compiled and timed beside the best so far, in alternating rounds; it
is kept where the whole interval of their ratio is below 1 by a margin, so that noise decides
nothing. The recipe with the winners builds the same model again without timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from qcompile.compiler.config import lowering_forms
from qcompile.compiler.config import recipe as recipes
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.report import Report
from qcompile.compiler.search.mixed_precision import Built
from qcompile.compiler.stages.job import Job
from qcompile.compiler.stages.verify import largest
from qcompile.data.feeds import Feed
from qcompile.ir.model_io.write_model import ModelFiles
from qcompile.ir.printer import dump
from qcompile.runtime import latency
from qcompile.targets.target import LoweringOption

# A way must be faster by one percent at least: less is not worth a recipe of one's own.
_BELOW = 0.99
_TIMING = latency.TimingOptions(rounds=8, seconds=0.25)

Assemble = Callable[[Recipe], tuple[Job, ModelFiles]]


@dataclass(frozen=True)
class Trial:
    """One way against the best so far: ``ratio`` is its time over the other's, ``low`` to ``high``
    the interval of that; None where both are the same graph."""

    form: str
    choice: str
    ratio: float | None
    low: float | None
    high: float | None
    kept: bool


def refusal(first: Built) -> str | None:
    """Why nothing can be tuned, None where it can."""
    job = first.job
    if not job.target.forms:
        return f"target {job.target.name!r} has one form of everything"
    if job.is_away:
        return f"{job.target.provider} is not installed here"
    if job.recipe.pipeline:
        return "a pipeline is all there is"
    if not first.feeds:
        return "there are no inputs to time with, give --data"
    if job.feeds is not None and not job.feeds.reusable:
        return "the data can be read once only, give a list or a file"
    return None


def tune(first: Built, assemble: Assemble) -> tuple[Recipe, list[Trial]]:
    """The recipe with the fastest forms, and what was tried. ``assemble`` compiles a recipe.

    Raises what compiling does.
    """
    job, feed = first.job, largest(first.feeds)
    tried: list[Trial] = []
    best = job, first.model
    for form in job.target.forms:
        for name, recipe in lowering_forms.others(job.target, job.mode, form, best[0].recipe):
            job.progress.step(f"tune: {form.name} {name}", _TIMING.rounds)
            made = assemble(recipe)
            # The files differ in any case: each has the digest of its recipe.
            if dump(made[0].graph) == dump(best[0].graph):
                tried.append(Trial(form.name, name, None, None, None, kept=False))
                continue
            tried.append(_trial(job, form, name, (best[1], made[1]), feed))
            if tried[-1].kept:
                best = made
    return best[0].recipe, tried


def _trial(
    job: Job, form: LoweringOption, name: str, models: tuple[ModelFiles, ModelFiles], feed: Feed
) -> Trial:
    options = latency.TimingOptions(
        job.options.threads, _TIMING.rounds, _TIMING.seconds, provider=job.provider
    )
    labelled = [("best so far", models[0].path), (name, models[1].path)]
    ratio = latency.compare_latency(labelled, feed, options, job.progress.advance).ratio(1)
    kept = ratio.high < _BELOW
    return Trial(form.name, name, ratio.median, ratio.low, ratio.high, kept)


def account(tried: list[Trial], feed: Feed) -> dict[str, Any]:
    """Plain values, ready for the report."""
    shapes = {name: list(value.shape) for name, value in feed.items()}
    return {"shapes": shapes, "trials": [asdict(t) for t in tried]}


def to_yaml(report: Report) -> str:
    """The recipe of a tuned build as a file, with where and in which shapes it was timed."""
    about = report.to_dict()["environment"]
    where = f"{', '.join(about['isa'])}, onnxruntime {about['onnxruntime']}"
    shapes = ", ".join(f"{n} {s}" for n, s in report.tuning["shapes"].items())
    kept = {
        t["form"]: f"{1 / t['ratio']:.2f} times as fast"
        for t in report.tuning["trials"]
        if t["kept"]
    }
    heading = (f"tuned for {report.source} on {where}", f"shapes: {shapes}")
    return recipes.to_yaml(Recipe(**report.recipe), heading, kept)


def told(trial: Trial) -> str:
    """One trial in words."""
    if trial.ratio is None:
        return f"{trial.form} {trial.choice}: the same graph"
    speed = f"{1 / trial.ratio:.2f} times as fast"
    return f"{trial.form} {trial.choice}: {speed}{', kept' if trial.kept else ''}"
