"""The task of a transformers model, read from its configuration, and the outputs of each task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import ModelError


@dataclass(frozen=True)
class Task:
    """One task, by optimum's name.

    architecture: suffix of the class names of its models. auto: the transformers class that loads
    one. outputs: names of the ONNX model's outputs. by_token: the outputs' second axis is tokens.
    """

    name: str
    architecture: str
    auto: str
    outputs: tuple[str, ...]
    by_token: bool = True


TASKS = (
    Task("feature-extraction", "Model", "AutoModel", ("last_hidden_state",)),
    Task("fill-mask", "ForMaskedLM", "AutoModelForMaskedLM", ("logits",)),
    Task(
        "text-classification",
        "ForSequenceClassification",
        "AutoModelForSequenceClassification",
        ("logits",),
        by_token=False,
    ),
    Task(
        "token-classification",
        "ForTokenClassification",
        "AutoModelForTokenClassification",
        ("logits",),
    ),
    Task(
        "question-answering",
        "ForQuestionAnswering",
        "AutoModelForQuestionAnswering",
        ("start_logits", "end_logits"),
    ),
)


def task_named(name: str) -> Task:
    """The task of that name. Raises ModelError, which lists the known ones."""
    named = next((task for task in TASKS if task.name == name), None)
    if named is None:
        known = ", ".join(task.name for task in TASKS)
        raise ModelError(f"unknown task {name!r}, expected one of {known}")
    return named


def task_of(folder: Path) -> Task:
    """The task that ``architectures`` in config.json means. Raises ModelError if it is unknown."""
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for task in TASKS:
        if isinstance(name, str) and name.endswith(task.architecture):
            return task
    known = ", ".join(task.name for task in TASKS)
    raise ModelError(
        f"config.json names the architecture {name!r}, whose task is unknown: give --task, one of "
        f"{known}; other models: export with optimum-cli, then qcompile compile FOLDER"
    )


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises ModelError: missing, not JSON, not an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{file.name} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{file.name} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} holds {type(content).__name__}, expected an object")
    return content
