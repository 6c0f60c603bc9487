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

    teacher: where the data has no labels, what its answers are compared with. Raises TrainingError
    where the output does not fit the task.
    """
    meter = Meter(data.task, labelled=data.labelled)
    where = device or torch.device("cpu")
    with torch.no_grad():
        for batch in data.ordered():
            feed = TensorBatch.of(batch, where).feed
            own = slice(batch.count)
            targets = None if batch.targets is None else batch.targets[own]
            needed = teacher if targets is None else None
            of_teacher = _answers(needed, feed, output)[own] if needed is not None else None
            answers = _answers(module, feed, output)[own]
            meter.update(answers, batch.mask[own], targets, of_teacher)
            on_batch()
    return meter.score()


def _answers(module: nn.Module, feed: dict[str, torch.Tensor], output: str) -> Array:
    answers: Array = module(feed)[output].float().cpu().numpy()
    return answers
