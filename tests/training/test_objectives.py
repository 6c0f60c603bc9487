"""Losses by hand: zero where student and teacher agree, and blind to padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qcompile.errors import TrainingError
from qcompile.training.labelled.labelled_data import Batch
from qcompile.training.labelled.task import IGNORED, Kind, Task
from qcompile.training.loop.objectives import (
    Distillation,
    Objective,
    TensorBatch,
    answer_distance,
    direction_error,
    label_loss,
    relative_error,
)

CLASSES = Task("classification", ("a", "b"))
SETS, TAGS = Task("multi-label", ("a", "b")), Task("tokens", ("O", "B"))
SCORES, EMBEDDING = Task("regression"), Task("embedding")
MASK = torch.tensor([[True, True, False], [True, False, False]])
ROWS = torch.tensor([[1.0, -2], [0.5, 3]])
TOKENS = torch.arange(12.0).reshape(2, 3, 2) - 4


def batch(targets: torch.Tensor | None = None) -> TensorBatch:
    return TensorBatch({}, MASK, targets)


def test_cross_entropy() -> None:
    found = label_loss(CLASSES, ROWS, torch.tensor([0, 0]))
    by_hand = (math.log1p(math.exp(-3)) + math.log1p(math.exp(2.5))) / 2
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


def test_sets_and_scores() -> None:
    found = label_loss(SETS, torch.tensor([[0.0, 2]]), torch.tensor([[1.0, 0]]))
    assert float(found) == pytest.approx((math.log(2) + math.log1p(math.exp(2))) / 2, rel=1e-6)
    for answers in (torch.tensor([[1.0], [4]]), torch.tensor([1.0, 4])):
        assert float(label_loss(SCORES, answers, torch.tensor([2.0, 2]))) == 2.5


def test_ignored_tokens_do_not_count() -> None:
    targets = torch.tensor([[0, IGNORED, IGNORED], [1, IGNORED, IGNORED]])
    changed = TOKENS.clone()
    changed[:, 1:] = 99
    expected = label_loss(CLASSES, TOKENS[:, 0], torch.tensor([0, 1]))
    assert torch.equal(label_loss(TAGS, TOKENS, targets), expected)
    assert torch.equal(label_loss(TAGS, changed, targets), expected)
    assert float(label_loss(TAGS, TOKENS, torch.full((2, 3), IGNORED))) == 0


@pytest.mark.parametrize(
    ("task", "answers"),
    [(CLASSES, ROWS), (SETS, ROWS), (SCORES, ROWS), (TAGS, TOKENS), (EMBEDDING, TOKENS),
     (EMBEDDING, ROWS)],
)  # fmt: skip
def test_a_distance_is_zero_only_where_answers_are_equal(task: Task, answers: torch.Tensor) -> None:
    def distance(other: torch.Tensor) -> float:
        return float(answer_distance(task, answers, other, MASK, 2.0))

    # Sums of float32 logarithms and cosines are exact to some 2^-23 of values up to 10.
    assert distance(answers.clone()) == pytest.approx(0, abs=1e-5)
    other = answers.clone()
    other[0, ..., 0] += 1
    assert distance(other) > 1e-3


@pytest.mark.parametrize("kind", ["tokens", "embedding"])
def test_a_distance_is_blind_to_padding(kind: Kind) -> None:
    task = Task(kind, TAGS.labels if kind == "tokens" else ())
    other = TOKENS.flip(0)
    changed = other.clone()
    changed[~MASK] = 1e6
    found = [answer_distance(task, TOKENS, teacher, MASK, 2.0) for teacher in (other, changed)]
    assert torch.equal(*found)


def test_logits_by_hand() -> None:
    """Kullback-Leibler of (3/4, 1/4) from (1/2, 1/2), at temperature 2."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = answer_distance(CLASSES, student, teacher, MASK[:1], 2.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_relative_error_and_direction_by_hand() -> None:
    one, two = torch.tensor([[1.0, 0]]), torch.tensor([[2.0, 0]])
    assert float(relative_error(one, two, MASK[:1])) == 0.25
    assert float(direction_error(one, two, MASK[:1])) == pytest.approx(0, abs=1e-6)
    assert float(direction_error(one, -two, MASK[:1])) == pytest.approx(2)
    assert float(relative_error(one, one * 0, MASK[:1])) < float("inf")


def test_the_parts_are_weighted() -> None:
    weights = Distillation(2.0, answers=3.0, hidden=5.0, labels=0.5, pairs=(("x", "u"), ("y", "v")))
    objective = Objective(CLASSES, "logits", weights)
    targets = torch.tensor([0, 1])
    student = {"logits": ROWS, "x": TOKENS, "y": TOKENS}
    teacher = {"logits": -ROWS, "u": -TOKENS, "v": TOKENS}
    expected = (
        0.5 * label_loss(CLASSES, ROWS, targets)
        + 3 * answer_distance(CLASSES, ROWS, -ROWS, MASK, 2.0)
        + 2.5 * relative_error(TOKENS, -TOKENS, MASK)
    )
    found = objective.loss(student, teacher, batch(targets))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    without = objective.loss(student, teacher, batch())
    assert float(without) == pytest.approx(
        float(expected - 0.5 * label_loss(CLASSES, ROWS, targets)), rel=1e-6
    )
    assert objective.watched == ("x", "y") and objective.taught == ("u", "v")


def test_labels_alone() -> None:
    objective, targets = Objective(CLASSES, "logits", None), torch.tensor([0, 1])
    found = objective.loss({"logits": ROWS}, None, batch(targets))
    assert torch.equal(found, label_loss(CLASSES, ROWS, targets)) and objective.watched == ()
    with pytest.raises(TrainingError, match="give a teacher"):
        objective.loss({"logits": ROWS}, None, batch())


def test_shapes_that_do_not_fit() -> None:
    objective = Objective(CLASSES, "logits", Distillation(pairs=(("x", "u"),)))
    student, teacher = {"logits": ROWS, "x": TOKENS}, {"logits": ROWS, "u": ROWS}
    with pytest.raises(TrainingError, match=r"'x' has shape \[2, 3, 2\], .* as the teacher's 'u'"):
        objective.loss(student, teacher, batch())
    with pytest.raises(TrainingError, match=r"shape \[2, 2\], expected \[3, 2\]"):
        objective.loss(student, teacher, batch(torch.tensor([0, 1, 0])))


def test_a_batch_becomes_tensors() -> None:
    made = Batch({"x": np.arange(2)}, MASK.numpy(), np.array([0.5], np.float32), 1)
    found = TensorBatch.of(made, torch.device("cpu"))
    assert found.feed["x"].dtype == torch.int64 and found.mask.dtype == torch.bool
    assert found.targets is not None and found.targets.tolist() == [0.5]
