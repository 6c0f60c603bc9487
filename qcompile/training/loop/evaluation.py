"""Scores a module on data, with the metric of its task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qcompile.quant import Array
from qcompile.training.labelled.labelled_data import LabelledData
from qcompile.training.labelled.metrics import Meter, Score
from qcompile.training.loop.objectives import TensorBatch


def evaluate(
    module: nn.Module,
    teacher: nn.Module | None,
    data: LabelledData,
    output: str,
    device: torch.device | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Score:
    """The score of a module's output on all of the data.

    teacher: what the answers are compared with; needed where the data has no labels, else for
    ``Score.distance``. Raises TrainingError where the output does not fit the task.
    """
    meter = Meter(data.task, labelled=data.labelled)
    where = device or torch.device("cpu")
    with torch.no_grad():
        for batch in data.ordered():
            feed = TensorBatch.of(batch, where).feed
            own = slice(batch.count)
            targets = None if batch.targets is None else batch.targets[own]
            of_teacher = None if teacher is None else _answers(teacher, feed, output)[own]
            answers = _answers(module, feed, output)[own]
            meter.update(answers, batch.mask[own], targets, of_teacher)
            on_batch()
    return meter.score()


def _answers(module: nn.Module, feed: dict[str, torch.Tensor], output: str) -> Array:
    answers: Array = module(feed)[output].float().cpu().numpy()
    return answers
