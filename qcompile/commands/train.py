"""qcompile train FOLDER -o OUT --data DATA --eval DATA"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from qcompile.commands import _build
from qcompile.commands._compile_arguments import (
    BuildArguments,
    build_options,
    metric_option,
)
from qcompile.commands._help import GroupedCommand
from qcompile.commands._options import (
    PATH,
    gate_options,
    output_options,
    text_options,
)
from qcompile.commands._recipe_options import recipe_options
from qcompile.commands._report_files import report_option
from qcompile.compiler.stages.options import ONE_FILE, Request, TrainingOptions
from qcompile.data.streams.storage import names_stream
from qcompile.errors import OutputError, RecipeError
from qcompile.runtime.evaluation.closeness import Gates

_POSITIVE = click.FloatRange(0, min_open=True)


class _TextFile(click.Path):
    """A file of texts, which is read in random order."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not Path(value).exists() and names_stream(value):
            self.fail(f"{value!r} is no single file: {ONE_FILE}", param, ctx)
        return super().convert(value, param, ctx)


_FILE = _TextFile(path_type=Path, exists=True, dir_okay=False)
_TRAINING_OPTIONS = (
    click.option("--eval", "evaluation", type=_FILE, help="Labelled texts that choose the best "
                 "checkpoint and decide --max-drop; none of them may be in --data."),
    click.option("--distill", is_flag=True, help="Learn the float model's outputs on the texts of "
                 "--data: needs no labels."),
    click.option("--max-drop", type=float, default=1.0, show_default=True, metavar="POINTS",
                 help="How many points the metric on --eval may fall below the float model's."),
    click.option("--epochs", type=_POSITIVE, help="Passes over --data.  [default: 3; with --steps "
                 "or --train-time as many as these allow]"),
    click.option("--steps", type=click.IntRange(1), help="Optimizer steps, at most."),
    click.option("--train-time", type=_POSITIVE, metavar="SECONDS", help="Time limit of the "
                 "training, in seconds."),
    click.option("--learning-rate", type=_POSITIVE, help="Peak learning rate of weights and "
                 "biases; twice that for weights of 3 bits, four times for 2 bits, with --distill "
                 "a quarter for 8 bits.  [default: 2.5e-5]"),
    click.option("--range-rate", type=_POSITIVE, default=1e-3, show_default=True,
                 help="Learning rate of the logarithms of scales."),
    click.option("--resume/--no-resume", default=True, help="Continue an interrupted run from its "
                 "state next to OUT, or begin again.  [default: resume]"),
)  # fmt: skip


def _training_options(command: Any) -> Any:
    for option in reversed(_TRAINING_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class TrainArguments(BuildArguments):
    """What only ``train`` has."""

    data: str
    evaluation: Path | None
    distill: bool
    max_drop: float
    epochs: float | None
    steps: int | None
    train_time: float | None
    learning_rate: float | None
    range_rate: float
    resume: bool

    def default_gates(self) -> Gates:
        """Of a model that learned from labels, closeness to the float model is not the goal, so
        that its gates are off unless they were given."""
        return Gates() if self.distill else Gates().without_defaults()

    def make_request(self) -> Request:
        """The request with its training. ``--batch-size`` is that of training.

        Raises RecipeError where nothing says how good the result is.
        """
        if self.evaluation is None and not self.distill:
            raise RecipeError(
                "training from labels needs --eval, labelled texts that are not in --data: they "
                "choose the checkpoint (not needed with --distill)"
            )
        request, training = super().make_request(), self._training()
        options = replace(request.options, batch_size=None, training=training)
        return replace(request, options=options)

    def _training(self) -> TrainingOptions:
        state = self.output.with_name(f"{self.output.stem}.training.pt")
        if not self.resume:
            _remove(state)
        return TrainingOptions(
            data=Path(self.data),
            evaluation=self.evaluation,
            distill=self.distill,
            epochs=self.epochs,
            steps=self.steps,
            seconds=self.train_time,
            learning_rate=self.learning_rate,
            range_rate=self.range_rate,
            batch_size=self.batch_size or TrainingOptions.batch_size,
            max_drop=self.max_drop if self.evaluation is not None else None,
            state=state,
        )


def _remove(state: Path) -> None:
    try:
        state.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"state {str(state)!r} cannot be removed: {e.strerror}") from e


@click.command("train", cls=GroupedCommand)
@click.argument("model", metavar="FOLDER", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@click.option("--data", type=_FILE, required=True, help="Texts to train on, with labels: .jsonl or "
              ".csv; .txt too with --distill. A sample of them calibrates.")  # fmt: skip
@_training_options
@text_options
@recipe_options
@gate_options(compiling=True)
@metric_option
@report_option
@build_options
@output_options
def train(**given: Any) -> None:
    """Train a transformers FOLDER with the target's quantizers in the loop, and compile it.

    The planned model, with its calibrated scales and rounded weights, is trained in torch: from the
    labels of --data, or with --distill from the float model's outputs. What was learned is written
    back into the graph, and OUT is a folder as compile writes it. Its metric on --eval must be
    within --max-drop of the float model's. Closeness to the float model is gated as in compile with
    --distill; without, only where you give a gate.
    """
    arguments = TrainArguments(**given)
    if os.environ.get("RANK", "0") != "0":  # torchrun: the first process talks for all
        arguments = replace(arguments, quiet=True)
    _build.build(arguments, arguments.make_request())
