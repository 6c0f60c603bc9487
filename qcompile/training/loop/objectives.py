"""What training minimizes: the task's loss on labels, and the distance to the float model.

Distillation follows Hinton et al. 2015 ("Distilling the knowledge in a neural network", section 2)
for logits, and TernaryBERT (Zhang et al. 2020, section 3.3) for hidden states. Distances of hidden
states are relative to the teacher's mean square, so one weight serves encoders of any scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional

from qcompile.errors import TrainingError
from qcompile.training.labelled.labelled_data import Batch
from qcompile.training.labelled.metrics import check_answers
from qcompile.training.labelled.task import IGNORED, Task

Outputs: TypeAlias = Mapping[str, torch.Tensor]
_LEAST = 1e-12  # of a sum of squares that is divided by


class TensorBatch(NamedTuple):
    """A ``labelled_data.Batch`` on a device."""

    feed: dict[str, torch.Tensor]
    mask: torch.Tensor
    targets: torch.Tensor | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> TensorBatch:
        """Copies of the arrays."""
        targets = None if batch.targets is None else torch.tensor(batch.targets, device=device)
        feed = {name: torch.tensor(array, device=device) for name, array in batch.feed.items()}
        return cls(feed, torch.tensor(batch.mask, device=device), targets)


@dataclass(frozen=True)
class Distillation:
    """Weights of the distances to the teacher.

    Attributes:
        temperature: that logits are divided by.
        answers: weight of the distance of the main output: Kullback-Leibler of logits, mean square
            of scores; for an embedding, relative mean square and 1 - cosine.
        hidden: weight of the mean distance of the pairs, relative mean squares.
        labels: weight of the loss on labels.
        pairs: tensors of student and teacher that should be equal, by name.
    """

    temperature: float = 2.0
    answers: float = 4.0
    hidden: float = 1.0
    labels: float = 0.3
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Objective:
    """The loss of one task on the output named ``output``.

    distillation: None where there is no teacher; then data must have labels.
    """

    task: Task
    output: str
    distillation: Distillation | None = field(default_factory=Distillation)

    @property
    def watched(self) -> tuple[str, ...]:
        """Tensors of the student that ``loss`` reads in addition to the outputs."""
        return tuple(mine for mine, _ in self._pairs)

    @property
    def taught(self) -> tuple[str, ...]:
        """Tensors of the teacher that ``loss`` reads in addition to the outputs."""
        return tuple(others for _, others in self._pairs)

    @property
    def _pairs(self) -> tuple[tuple[str, str], ...]:
        return self.distillation.pairs if self.distillation else ()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: TensorBatch) -> torch.Tensor:
        """The loss of a batch, a scalar; gradients flow into the student's outputs.

        Raises TrainingError where shapes do not fit the task or each other.
        """
        answers = student[self.output]
        parts = []
        if batch.targets is not None:
            check_answers(self.task, tuple(answers.shape), tuple(batch.targets.shape))
            weight = self.distillation.labels if self.distillation else 1.0
            parts.append(weight * label_loss(self.task, answers, batch.targets))
        if self.distillation and teacher is not None:
            parts += self._distances(self.distillation, student, teacher, batch)
        if not parts:
            raise TrainingError("data without labels is for distillation: give a teacher")
        return torch.stack(parts).sum()

    def _distances(
        self, weights: Distillation, student: Outputs, teacher: Outputs, batch: TensorBatch
    ) -> list[torch.Tensor]:
        mine, others = student[self.output], teacher[self.output]
        _check_pair(self.output, mine, self.output, others)
        distance = answer_distance(self.task, mine, others, batch.mask, weights.temperature)
        found = [weights.answers * distance]
        for one, other in weights.pairs:
            _check_pair(one, student[one], other, teacher[other])
            part = relative_error(student[one], teacher[other], batch.mask)
            found.append(weights.hidden / len(weights.pairs) * part)
        return found


def _check_pair(one: str, mine: torch.Tensor, other: str, others: torch.Tensor) -> None:
    if mine.shape != others.shape:
        raise TrainingError(
            f"tensor {one!r} has shape {list(mine.shape)}, expected {list(others.shape)} as the "
            f"teacher's {other!r}"
        )


def label_loss(task: Task, answers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss on labels: cross entropy, binary for sets of labels, or the squared error.

    answers: as ``metrics.check_answers`` expects them. targets: as in ``labelled_data.Batch``.
    Tokens without a tag do not count; a batch without any tag has loss 0.
    """
    if task.kind == "regression":
        return functional.mse_loss(answers.reshape(-1), targets)
    if task.kind == "multi-label":
        return functional.binary_cross_entropy_with_logits(answers, targets)
    columns = answers.shape[-1]
    total = functional.cross_entropy(
        answers.reshape(-1, columns), targets.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp(min=1)


def answer_distance(
    task: Task,
    answers: torch.Tensor,
    of_teacher: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """How far the answers are from the teacher's, by the kind of the task; 0 where they are equal.

    answers, of_teacher: float [rows, columns] or [rows, width, columns]. mask: bool [rows, width].
    """
    if task.kind == "embedding":
        return relative_error(answers, of_teacher, mask) + direction_error(
            answers, of_teacher, mask
        )
    if task.kind == "regression":
        return functional.mse_loss(answers, of_teacher)
    a, b = answers / temperature, of_teacher / temperature
    if task.kind == "multi-label":
        # Kullback-Leibler of two Bernoulli distributions: cross entropy without its minimum.
        shares = b.sigmoid()
        cross = functional.binary_cross_entropy_with_logits
        return cross(a, shares) - cross(b, shares)
    if a.dim() == 3:
        a, b = a[mask], b[mask]
    logs = a.log_softmax(-1), b.log_softmax(-1)
    return functional.kl_div(*logs, reduction="batchmean", log_target=True)


def relative_error(
    values: torch.Tensor, of_teacher: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The squared error of real tokens over the teacher's squares.

    values, of_teacher: float, of equal shape; padding is left out where they begin with mask's
    shape. mask: bool [rows, width].
    """
    if values.shape[:2] == mask.shape and values.dim() > 2:
        values, of_teacher = values[mask], of_teacher[mask]
    return (values - of_teacher).square().sum() / of_teacher.square().sum().clamp(min=_LEAST)


def direction_error(
    values: torch.Tensor, of_teacher: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """1 - cosine, the mean over rows; tokens [rows, width, columns] are first averaged."""
    if values.dim() == 3:
        weights = mask.unsqueeze(-1).to(values.dtype)
        values, of_teacher = ((x * weights).sum(1) for x in (values, of_teacher))
    return 1 - functional.cosine_similarity(values, of_teacher, dim=-1).mean()
