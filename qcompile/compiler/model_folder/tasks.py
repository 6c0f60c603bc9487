"""What a transformers model is for, read from its configuration: tasks, and what each puts out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import ModelError


@dataclass(frozen=True)
class Task:
    """One task, by optimum's name.

    architecture: how the class names of its models end. auto: the class of transformers that loads
    one. outputs: names of what the ONNX model puts out. by_token: the outputs' second axis is that
    of the tokens.
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
    """The task of that name. Raises ModelError with those that there are."""
    found = next((task for task in TASKS if task.name == name), None)
    if found is None:
        known = ", ".join(task.name for task in TASKS)
        raise ModelError(f"unknown task {name!r}, expected one of {known}")
    return found


def task_of(folder: Path) -> Task:
    """What config.json's ``architectures`` says. Raises ModelError where it says nothing known."""
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for task in TASKS:
        if isinstance(name, str) and name.endswith(task.architecture):
            return task
    known = ", ".join(task.name for task in TASKS)
    raise ModelError(
        f"config.json names the architecture {name!r}, which tells no task: give --task, one of "
        f"{known}; other models: export with optimum-cli, then qcompile compile FOLDER"
    )


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises ModelError: missing, no JSON, no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{file.name} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{file.name} is not JSON: {e}") from e
    if not isinstance(found, dict):
        raise ModelError(f"{file.name} holds {type(found).__name__}, expected an object")
    return found
