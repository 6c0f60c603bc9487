"""What a model answers, found from its config.json, and the target that a row of data gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from qcompile.data.feeds import Dim
from qcompile.errors import DataError, TrainingError

Kind = Literal["classification", "multi-label", "regression", "tokens", "embedding"]
Target: TypeAlias = int | float | tuple[int, ...]

IGNORED = -100  # the target of tokens that have none, as in transformers and torch
_FIELDS = {
    "classification": "label",
    "multi-label": "label",
    "regression": "score",
    "tokens": "tags",
}
_HEADS: dict[str, Kind] = {
    "SequenceClassification": "classification",
    "TokenClassification": "tokens",
}
_PROBLEMS: dict[str, Kind] = {
    "multi_label_classification": "multi-label",
    "regression": "regression",
    "single_label_classification": "classification",
}
_SHOWN = 8  # labels that an error lists


@dataclass(frozen=True)
class Task:
    """What the model answers; ``labels`` are in the order of its logits.

    A regression has one number and no labels. An embedding has no labels either: its target is
    the answer of the float model.
    """

    kind: Kind
    labels: tuple[str, ...] = ()

    def index(self, label: object) -> int:
        """The logit of a label, which is given by name or by number. Raises ValueError.

        A name counts first. Numbers count only where no name is a number.
        """
        name = _name(label)
        if name in self.labels:
            return self.labels.index(name)
        is_number = name.removeprefix("-").isdecimal()
        if not is_number or any(known.isdecimal() for known in self.labels):
            raise ValueError(f"unknown label {label!r}, expected {self._expected()}")
        if not 0 <= int(name) < len(self.labels):
            raise ValueError(f"label {label!r} is out of range, expected {self._expected()}")
        return int(name)

    def target(self, row: Mapping[str, Any], words: int | None = None) -> Target:
        """The target of a row of data: a class, the set of classes, a score, or a class per word.

        words: of a text that is split into words, their number. Raises ValueError.
        """
        value = self._given(row)
        if self.kind == "regression":
            return _score(value)
        if self.kind == "classification":
            return self.index(value)
        if self.kind == "multi-label":
            parts = value if isinstance(value, list) else str(value).split(";")
            return tuple(self.index(_stripped(part)) for part in parts if part != "")
        tags = value if isinstance(value, list) else str(value).split()
        if len(tags) != words:
            raise ValueError(f"{len(tags)} tags for {words} tokens, expected one for each")
        return tuple(self.index(tag) for tag in tags)

    def _given(self, row: Mapping[str, Any]) -> Any:
        """The value of the field that this task reads."""
        field = _FIELDS[self.kind]
        value = row.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            others = [f for f in dict.fromkeys(_FIELDS.values()) if row.get(f) not in (None, "")]
            found = f" ({others[0]!r} is given)" if others else ""
            raise ValueError(f"field {field!r} is missing{found}; {self._purpose()}")
        if isinstance(value, dict) or (isinstance(value, list) and not self._takes_lists()):
            kind = type(value).__name__
            raise ValueError(f"field {field!r} is a {kind}; {self._purpose()}")
        return _stripped(value)

    def _takes_lists(self) -> bool:
        return self.kind in ("multi-label", "tokens")

    def _purpose(self) -> str:
        if self.kind == "regression":
            return "the model gives one number, expected a score"
        if self.kind == "tokens":
            return f"the model labels each token, expected a list of {self._expected()}"
        several = "any of" if self.kind == "multi-label" else "one of"
        return f"the model has {len(self.labels)} classes, expected {several} {self._listed()}"

    def _expected(self) -> str:
        listed = f"one of {self._listed()}"
        if any(known.isdecimal() for known in self.labels):
            return listed
        return f"{listed}, or a number from 0 to {len(self.labels) - 1}"

    def _listed(self) -> str:
        rest = len(self.labels) - _SHOWN
        return ", ".join(self.labels[:_SHOWN]) + (f" and {rest} others" if rest > 0 else "")


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _name(label: object) -> str:
    """The label as text; true and false are 1 and 0, and 1.0 is 1."""
    if isinstance(label, bool) or (isinstance(label, float) and label.is_integer()):
        label = int(label)
    return str(label)


def _score(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"score {value!r} is not a number")
    try:
        score = float(value)
    except (ValueError, OverflowError) as e:
        raise ValueError(f"score {value!r} is not a number") from e
    if not math.isfinite(score):
        raise ValueError(f"score {value!r} is not finite")
    return score


def task_of(config: Mapping[str, Any], output: str, shape: tuple[Dim, ...] | None) -> Task:
    """The task of a model with this config.json and main output.

    The head's name in ``architectures`` decides; where there is none, an output named logits does,
    by its rank. ``problem_type``, and one label, say what kind of a classifier it is.

    Raises TrainingError for a head without labelled training, DataError for labels that do not
    count from 0 or do not fit the output.
    """
    kind = _kind(config, output, shape)
    if kind == "embedding":
        return Task(kind)
    width = shape[-1] if shape else None
    labels = labels_of(config) or _numbered(width)
    problem = config.get("problem_type")
    if kind == "classification":
        kind = _PROBLEMS.get(str(problem), "regression" if len(labels) == 1 else kind)
    if isinstance(width, int) and labels and width != len(labels):
        raise DataError(
            f"output {output!r} has {width} columns, but config.json names {len(labels)} labels"
        )
    if kind == "regression":
        return Task(kind)
    if not labels:
        raise DataError(f"the labels of output {output!r} are unknown: add id2label to config.json")
    return Task(kind, labels)


def _kind(config: Mapping[str, Any], output: str, shape: tuple[Dim, ...] | None) -> Kind:
    """What the head is for; all classifiers are one kind here."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    head = name.partition("For")[2]
    if head in _HEADS:
        return _HEADS[head]
    if head:
        raise TrainingError(
            f"{name} is not trained with labels, expected a model for {' or '.join(_HEADS)}, "
            "or an encoder: distil it from unlabelled text"
        )
    if name or output != "logits":
        return "embedding"
    return "tokens" if shape is not None and len(shape) == 3 else "classification"


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a config.json by number, none where it has none. Raises DataError.

    ``id2label`` counts; ``label2id`` where it is missing.
    """
    named = config.get("id2label")
    if not named:
        ids = config.get("label2id") or {}
        named = {number: name for name, number in ids.items()} if isinstance(ids, dict) else ids
    try:
        found = {int(number): str(name) for number, name in named.items()}
    except (AttributeError, TypeError, ValueError) as e:
        raise DataError(f"id2label of config.json is no table of numbers and labels: {e}") from e
    if sorted(found) != list(range(len(found))):
        listed = ", ".join(map(str, sorted(found)[:_SHOWN]))
        raise DataError(f"id2label of config.json has the numbers {listed}, expected 0, 1, …")
    return tuple(found[number] for number in range(len(found)))


def _numbered(width: Dim) -> tuple[str, ...]:
    """Names as transformers makes them up, for as many labels as the output has columns."""
    return tuple(f"LABEL_{i}" for i in range(width)) if isinstance(width, int) else ()
