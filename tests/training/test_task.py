"""The task is found from config.json, and rows give targets or one clear reason."""

from __future__ import annotations

from typing import Any

import pytest

from qcompile.data.feeds import Dim
from qcompile.errors import DataError, TrainingError
from qcompile.training.labelled.task import Task, labels_of, task_of

NAMES = ("ABBR", "DESC", "ENTY")
CLASSES = Task("classification", NAMES)
NUMBERED = Task("classification", ("1", "2", "3"))
SETS = Task("multi-label", NAMES)
TAGS = Task("tokens", ("O", "B", "I"))
SCORE = Task("regression")


def config(kind: str | None, labels: int = 0, **more: object) -> dict[str, Any]:
    named = {str(i): f"label {i}" for i in range(labels)}
    made: dict[str, Any] = {"id2label": named} if labels else {}
    return made | ({"architectures": [kind]} if kind else {}) | more


@pytest.mark.parametrize(
    ("given", "output", "shape", "kind", "labels"),
    [
        (config("BertForSequenceClassification", 6), "logits", ("b", 6), "classification", 6),
        (config("BertForSequenceClassification", 1), "logits", ("b", 1), "regression", 0),
        (config("XForSequenceClassification", 3, problem_type="regression"), "logits", None,
         "regression", 0),
        (config("XForSequenceClassification", 3, problem_type="multi_label_classification"),
         "logits", ("b", 3), "multi-label", 3),
        (config("XForSequenceClassification", 1, problem_type="single_label_classification"),
         "logits", ("b", 1), "classification", 1),
        (config("RobertaForTokenClassification", 9), "out", ("b", "t", 9), "tokens", 9),
        (config("BertModel"), "last_hidden_state", ("b", "t", 384), "embedding", 0),
        (config("BertModel", 2), "sentence_embedding", ("b", 384), "embedding", 0),
        ({}, "logits", ("b", 4), "classification", 4),
        ({}, "logits", ("b", "t", 4), "tokens", 4),
        ({}, "embedding", ("b", 4), "embedding", 0),
    ],
)  # fmt: skip
def test_the_head_decides(
    given: dict[str, Any], output: str, shape: tuple[Dim, ...] | None, kind: str, labels: int
) -> None:
    found = task_of(given, output, shape)
    assert found.kind == kind and len(found.labels) == labels


@pytest.mark.parametrize(
    ("given", "shape", "error", "message"),
    [
        (config("BertForQuestionAnswering"), None, TrainingError, "ForQuestionAnswering is not"),
        (config("BertForSequenceClassification", 6), ("b", 5), DataError, "5 columns.*6 labels"),
        (config("BertForSequenceClassification"), ("b", "n"), DataError, "add id2label"),
        (config("BertForTokenClassification", id2label={"1": "a", "2": "b"}), None, DataError,
         "numbers 1, 2, expected 0, 1"),
        (config("BertForTokenClassification", id2label=[1]), None, DataError, "no table"),
        (config("BertForTokenClassification", label2id=[1]), None, DataError, "no table"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_found(
    given: dict[str, Any], shape: tuple[Dim, ...] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        task_of(given, "logits", shape)


def test_labels_come_in_the_order_of_their_numbers() -> None:
    assert labels_of({"id2label": {"1": "b", "0": "a"}, "label2id": {"x": 0}}) == ("a", "b")
    assert labels_of({"label2id": {"b": 1, "a": 0}}) == ("a", "b")
    assert labels_of({}) == ()


@pytest.mark.parametrize(
    ("task", "row", "target"),
    [
        (CLASSES, {"label": "DESC"}, 1),
        (CLASSES, {"label": 2}, 2),
        (CLASSES, {"label": " 2 "}, 2),
        (CLASSES, {"label": 1.0}, 1),
        (CLASSES, {"label": True}, 1),
        (NUMBERED, {"label": 1}, 0),
        (NUMBERED, {"label": "3"}, 2),
        (SCORE, {"score": 2}, 2.0),
        (SCORE, {"score": "-1.5"}, -1.5),
        (SETS, {"label": ["ENTY", 0]}, (2, 0)),
        (SETS, {"label": "ABBR; DESC"}, (0, 1)),
        (SETS, {"label": []}, ()),
        (TAGS, {"tags": ["O", "B"]}, (0, 1)),
        (TAGS, {"tags": "I O"}, (2, 0)),
    ],
)
def test_targets(task: Task, row: dict[str, object], target: object) -> None:
    assert task.target(row, 2) == target


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (CLASSES, {}, "'label' is missing; the model has 3 classes, expected one of ABBR, DESC"),
        (CLASSES, {"label": None}, "'label' is missing"),
        (CLASSES, {"label": ""}, "'label' is missing"),
        (CLASSES, {"score": 2.5}, r"'label' is missing \('score' is given\); the model has 3"),
        (CLASSES, {"label": "X"}, "unknown label 'X', expected one of ABBR, DESC, ENTY, or a num"),
        (CLASSES, {"label": 3}, "label 3 is out of range, expected .* 0 to 2"),
        (CLASSES, {"label": -1}, "label -1 is out of range"),
        (CLASSES, {"label": 0.5}, "unknown label 0.5"),
        (CLASSES, {"label": ["ABBR"]}, "'label' is a list"),
        (CLASSES, {"label": {"a": 1}}, "'label' is a dict"),
        (NUMBERED, {"label": 0}, "unknown label 0, expected one of 1, 2, 3$"),
        (SCORE, {"label": 1}, r"'score' is missing \('label' is given\); the model gives one num"),
        (SCORE, {"score": float("nan")}, "score nan is not finite"),
        (SCORE, {"score": "high"}, "score 'high' is not a number"),
        (SCORE, {"score": True}, "score True is not a number"),
        (SCORE, {"score": 10**400}, "is not a number"),
        (SETS, {"label": ["X"]}, "unknown label 'X'"),
        (TAGS, {"tags": ["O"]}, "1 tags for 2 tokens"),
        (TAGS, {"label": 1}, "'tags' is missing .*the model labels each token"),
        (TAGS, {"tags": ["O", "X"]}, "unknown label 'X', expected one of O, B, I"),
    ],
)
def test_rows_that_do_not_fit(task: Task, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.target(row, 2)


def test_many_labels_are_not_all_listed() -> None:
    with pytest.raises(ValueError, match=r"l6, l7 and 69 others, or a number from 0 to 76$"):
        Task("classification", tuple(f"l{i}" for i in range(77))).index("x")
