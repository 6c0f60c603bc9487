"""How good a model's answers are, on data of any size, by the metric of its task.

| task | metric |
|---|---|
| classification | accuracy |
| multi-label | F1 over all decisions (micro), a logit over 0 being yes |
| regression | Spearman's rank correlation |
| tokens | F1 of the tags other than O (micro, per token) |
| no labels | mean cosine to the float model's answers |

Counts are kept, and for Spearman two numbers a sample.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.errors import TrainingError
from qcompile.quant import Array
from qcompile.training.labelled.task import IGNORED, Task

OUTSIDE = "O"  # the tag of a token that is part of nothing


@dataclass(frozen=True)
class Score:
    """The value of a metric, times 100; more is better. ``details`` are shares, not times 100.

    distance: squared error of the answers over the sum of the float model's squares; None where
    labelled answers were not compared with these.
    """

    metric: str
    value: float
    details: dict[str, float] = field(default_factory=dict)
    distance: float | None = None


class Meter:
    """Collects a model's answers, batch by batch, and gives their score.

    labelled: whether the metric compares answers with targets, or else with the float model's
    answers. Of labelled data, ``Score.distance`` compares with these too, where they are given.
    """

    def __init__(self, task: Task, *, labelled: bool) -> None:
        self._task, self._labelled = task, labelled
        self._rows = self._right = 0
        self._decided = _Decisions()
        self._pairs = array("d"), array("d")
        self._cosines = _Cosines()
        self._distance = _Distance()

    def update(
        self,
        answers: Array,
        mask: Array,
        targets: Array | None = None,
        of_teacher: Array | None = None,
    ) -> None:
        """Add a batch.

        answers: float [rows, columns], or [rows, width, columns] of tokens. mask: bool [rows,
        width]. targets: as in ``labelled_data.Batch``. of_teacher: float, the answers' shape.

        Raises TrainingError where shapes do not fit the task.
        """
        if not self._labelled:
            assert of_teacher is not None
            self._cosines.update(answers, of_teacher, mask)
            return
        assert targets is not None
        check_answers(self._task, answers.shape, targets.shape)
        if of_teacher is not None:
            self._distance.update(answers, of_teacher, mask)
        self._rows += len(targets)
        if self._task.kind == "regression":
            self._pairs[0].extend(answers.reshape(-1).tolist())
            self._pairs[1].extend(targets.tolist())
        elif self._task.kind == "multi-label":
            self._decided.update(answers > 0, targets > 0)
        else:
            self._update_classes(answers, targets)

    def _update_classes(self, answers: Array, targets: Array) -> None:
        known = targets != IGNORED
        chosen, expected = answers.argmax(-1)[known], targets[known]
        finite: Array = np.asarray(np.isfinite(answers).all(-1))[known]
        self._right += int(((chosen == expected) & finite).sum())
        if self._task.kind == "tokens":
            self._rows += len(expected) - len(targets)
            classes = np.arange(len(self._task.labels))
            inside = classes != self._outside
            self._decided.update(
                (chosen[:, None] == classes)[:, inside], (expected[:, None] == classes)[:, inside]
            )

    @property
    def _outside(self) -> int:
        labels = self._task.labels
        return labels.index(OUTSIDE) if OUTSIDE in labels else -1

    def score(self) -> Score:
        """The score of all batches so far; NaN where it is not defined."""
        if not self._labelled:
            return self._cosines.score()
        return replace(self._labelled_score(), distance=self._distance.value)

    def _labelled_score(self) -> Score:
        share = self._right / self._rows if self._rows else float("nan")
        if self._task.kind == "regression":
            answers, targets = (np.frombuffer(values) for values in self._pairs)
            return Score("spearman", 100 * spearman(answers, targets))
        if self._task.kind == "multi-label":
            return Score("f1", 100 * self._decided.f1)
        if self._task.kind == "tokens":
            return Score("f1", 100 * self._decided.f1, {"token_accuracy": share})
        return Score("accuracy", 100 * share)


def check_answers(task: Task, found: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """Raise TrainingError where answers have another shape than the task's logits or scores."""
    if task.kind == "regression":
        expected: tuple[int, ...] = (*targets, 1)
        fits = found in (expected, targets)
    else:
        expected = targets if task.kind == "multi-label" else (*targets, len(task.labels))
        fits = found == expected
    if not fits:
        raise TrainingError(
            f"the model answers with shape {list(found)}, expected {list(expected)} for "
            f"{task.kind} with {len(task.labels) or 'no'} labels"
        )


@dataclass
class _Decisions:
    """Decisions for yes or no: those rightly yes, and those that are yes in answer and target."""

    right: int = 0
    answered: int = 0
    expected: int = 0

    def update(self, answers: Array, targets: Array) -> None:
        self.right += int((answers & targets).sum())
        self.answered += int(answers.sum())
        self.expected += int(targets.sum())

    @property
    def f1(self) -> float:
        """2 right / (answered + expected), the harmonic mean of precision and recall."""
        total = self.answered + self.expected
        return 2 * self.right / total if total else float("nan")


@dataclass
class _Cosines:
    """Cosines of samples, over all real tokens; of single numbers, one over all samples."""

    count: int = 0
    total: float = 0.0
    worst: float = float("inf")
    single: Array = field(default_factory=lambda: np.zeros(3))

    def update(self, answers: Array, of_teacher: Array, mask: Array) -> None:
        a, b = _samples(answers, of_teacher, mask)
        dots = np.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
        if a.shape[1] == 1:
            self.single += dots.sum(1)
            return
        cosines = _cosine(*dots)
        self.count += len(cosines)
        self.total += float(cosines.sum())
        self.worst = float(np.minimum(self.worst, cosines.min()))

    def score(self) -> Score:
        if not self.count:
            mean = worst = float(_cosine(*self.single))
        else:
            mean, worst = self.total / self.count, self.worst
        return Score("cosine", 100 * mean, {"mean_cosine": mean, "worst_cosine": worst})


@dataclass
class _Distance:
    """The squared error of all answers, and the sum of the float model's squares."""

    error: float = 0.0
    size: float = 0.0

    def update(self, answers: Array, of_teacher: Array, mask: Array) -> None:
        a, b = _samples(answers, of_teacher, mask)
        self.error += float(np.square(a - b).sum())
        self.size += float(np.square(b).sum())

    @property
    def value(self) -> float | None:
        """None where nothing, or nothing but zeros, was compared with."""
        return self.error / self.size if self.size else None


def _samples(answers: Array, of_teacher: Array, mask: Array) -> tuple[Array, Array]:
    """Both as float64 rows, a sample each; padding is 0. Raises TrainingError."""
    if answers.shape != of_teacher.shape:
        found, expected = list(answers.shape), list(of_teacher.shape)
        raise TrainingError(f"the model answers with shape {found}, its teacher {expected}")
    a, b = (x.astype(np.float64) for x in (answers, of_teacher))
    if a.ndim == 3 and a.shape[:2] == mask.shape:
        a, b = a * mask[..., None], b * mask[..., None]
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _cosine(dot: Array, a: Array, b: Array) -> Array:
    """The cosine by three sums of squares; 1 where both are zero, 0 where one is."""
    norm = np.sqrt(a * b)
    cosine: Array = np.where(norm > 0, dot / np.where(norm > 0, norm, 1), (a == b) * 1.0)
    return np.where(np.isfinite(norm), cosine, np.nan)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation; ties share their mean rank. NaN where one of them is constant or NaN."""
    if not np.isfinite(a).all() or min(len(np.unique(a)), len(np.unique(b))) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: Array = (ends - (counts - 1) / 2)[inverse]
    return middle
