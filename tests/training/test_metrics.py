"""Metrics by hand, the same however the data is divided, and never good for broken answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompile.errors import TrainingError
from qcompile.quant import Array
from qcompile.training.labelled.metrics import Meter, Score, spearman
from qcompile.training.labelled.task import IGNORED, Task

CLASSES = Task("classification", ("a", "b", "c"))
SETS = Task("multi-label", ("a", "b"))
TAGS = Task("tokens", ("O", "B", "I"))
SCORES, EMBEDDING = Task("regression"), Task("embedding")
MASK = np.ones((2, 2), bool)


def scored(task: Task, answers: Array, targets: Array, mask: Array = MASK) -> Score:
    meter = Meter(task, labelled=True)
    meter.update(answers, mask, targets)
    return meter.score()


def compared(answers: Array, of_teacher: Array, mask: Array = MASK) -> Score:
    meter = Meter(EMBEDDING, labelled=False)
    meter.update(answers, mask, of_teacher=of_teacher)
    return meter.score()


def test_accuracy() -> None:
    logits = np.eye(3)[[0, 1, 2, 0]]
    assert scored(CLASSES, logits, np.array([0, 1, 1, 0])) == Score("accuracy", 75.0)


def test_batches_add_up() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(20, 3)), rng.integers(0, 3, 20)
    meter = Meter(CLASSES, labelled=True)
    for rows in (slice(0, 3), slice(3, 20)):
        meter.update(logits[rows], MASK, targets[rows])
    assert meter.score() == scored(CLASSES, logits, targets)


def test_distance_to_the_float_model_of_labelled_answers() -> None:
    logits, of_teacher, targets = np.eye(3)[:2], np.eye(3)[:2] * 2, np.array([0, 1])
    meter = Meter(CLASSES, labelled=True)
    for row in (slice(0, 1), slice(1, 2)):
        meter.update(logits[row], MASK[row], targets[row], of_teacher[row])
    assert meter.score() == Score("accuracy", 100.0, distance=(1 + 1) / (4 + 4))
    meter.update(logits, MASK, targets, np.full((2, 3), np.nan))
    assert math.isnan(meter.score().distance or 0)


def test_padding_has_no_distance() -> None:
    mask = np.array([[True, False]])
    answers, of_teacher = np.ones((1, 2, 3)), np.array([[[1.0, 1, 3], [9, 9, 9]]])
    meter = Meter(TAGS, labelled=True)
    meter.update(answers, mask, np.array([[0, IGNORED]]), of_teacher)
    assert meter.score().distance == (3 - 1) ** 2 / (1 + 1 + 9)
    with pytest.raises(TrainingError, match=r"shape \[1, 2, 3\], its teacher \[1, 3\]"):
        meter.update(answers, mask, np.array([[0, IGNORED]]), of_teacher[:, 0])


def test_answers_that_are_not_finite_are_wrong() -> None:
    assert scored(CLASSES, np.full((2, 3), np.nan), np.array([0, 0])).value == 0
    assert math.isnan(scored(SCORES, np.array([[np.nan], [1]]), np.array([1, 2])).value)
    assert math.isnan(compared(np.full((2, 3), np.nan), np.ones((2, 3))).value)
    assert math.isnan(compared(np.full((2, 3), np.nan), np.ones((2, 3))).details["worst_cosine"])


def test_f1_of_sets_of_labels() -> None:
    answers, targets = np.array([[1, 1], [-1, 1.0]]), np.array([[1, 0], [1, 1]])
    assert scored(SETS, answers, targets).value == pytest.approx(100 * 2 * 2 / (3 + 3))


def test_f1_of_tags_leaves_out_what_is_outside_or_ignored() -> None:
    logits = np.eye(3)[[[1, 2, 0, 1], [0, 0, 1, 2]]]
    targets = np.array([[1, 1, 0, IGNORED], [0, 2, 0, IGNORED]])
    found = scored(TAGS, logits, targets, np.ones((2, 4), bool))
    # B, I, B are answered, B, B, I expected, one of them right; 3 of 6 tokens are right.
    assert found.value == pytest.approx(100 * 2 / 6)
    assert found.details == {"token_accuracy": 0.5}
    plain = Task("tokens", ("X", "Y", "Z"))
    found = scored(plain, logits, targets, np.ones((2, 4), bool))
    assert found.value == pytest.approx(50)


def test_tags_that_are_all_ignored_have_no_score() -> None:
    found = scored(TAGS, np.zeros((1, 2, 3)), np.full((1, 2), IGNORED))
    assert math.isnan(found.value) and math.isnan(found.details["token_accuracy"])


def test_rank_correlation() -> None:
    rising = np.array([1.0, 2, 3, 4])
    assert spearman(rising, rising**3) == pytest.approx(1)
    assert spearman(rising, -rising) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 of 4.5 and 5.
    tied = np.array([1.0, 2, 2, 3])
    assert spearman(tied, rising) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(rising, np.ones(4)))
    for answers in (rising, rising[:, None]):
        assert scored(SCORES, answers, rising).value == pytest.approx(100)


def test_cosines_leave_out_padding() -> None:
    teacher = np.array([[[1.0, 0], [5, 5]], [[0, 1], [1, 0]]])
    answers = teacher.copy()
    answers[0, 1] = -3
    answers[1, 1] = [0, 1]
    found = compared(answers, teacher, np.array([[True, False], [True, True]]))
    assert found.metric == "cosine" and found.value == pytest.approx(75)
    assert found.details == pytest.approx({"mean_cosine": 0.75, "worst_cosine": 0.5})


def test_single_numbers_are_one_vector() -> None:
    assert compared(np.array([[1.0], [0]]), np.array([[1.0], [1]])).value == pytest.approx(
        100 / math.sqrt(2)
    )


def test_zeros_equal_zeros_only() -> None:
    found = compared(np.zeros((2, 3)), np.array([[0.0, 0, 0], [1, 0, 0]]))
    assert found.details == {"mean_cosine": 0.5, "worst_cosine": 0}


@pytest.mark.parametrize(
    ("task", "shape", "targets", "message"),
    [
        (CLASSES, (2, 4), (2,), r"shape \[2, 4\], expected \[2, 3\] for classification with 3"),
        (CLASSES, (2, 5, 3), (2,), r"expected \[2, 3\]"),
        (SETS, (2, 3), (2, 2), r"expected \[2, 2\]"),
        (TAGS, (2, 3), (2, 5), r"expected \[2, 5, 3\]"),
        (SCORES, (2, 2), (2,), r"expected \[2, 1\] for regression with no labels"),
    ],
)
def test_answers_of_another_task(
    task: Task, shape: tuple[int, ...], targets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        scored(task, np.zeros(shape), np.zeros(targets, np.int64))


def test_a_teacher_of_another_shape() -> None:
    with pytest.raises(TrainingError, match=r"shape \[2, 3\], its teacher \[2, 4\]"):
        compared(np.zeros((2, 3)), np.zeros((2, 4)))
