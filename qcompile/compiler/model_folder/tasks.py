"""The task of a transformers model, read from its configuration, and the outputs of each task."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import ModelError

_HEADS = ("HeadModel", "HeadsModel")  # of language models


@dataclass(frozen=True)
class Task:
    """One task, by optimum's name.

    architecture: suffixes of the class names of its models. auto: the transformers class that loads
    one. outputs: names of the ONNX model's outputs.
    """

    name: str
    architecture: tuple[str, ...]
    auto: str
    outputs: tuple[str, ...]

    def is_of(self, architecture: str) -> bool:
        """True for a class of models for this task; ``GPT2LMHeadModel`` is none without a head."""
        return architecture.endswith(self.architecture) and not architecture.endswith(_HEADS)


TASKS = (
    Task(
        "feature-extraction",
        ("Model", "ModelWithProjection", "Encoder"),
        "AutoModel",
        ("last_hidden_state",),
    ),
    Task("fill-mask", ("ForMaskedLM",), "AutoModelForMaskedLM", ("logits",)),
    Task(
        "text-classification",
        ("ForSequenceClassification",),
        "AutoModelForSequenceClassification",
        ("logits",),
    ),
    Task(
        "token-classification",
        ("ForTokenClassification",),
        "AutoModelForTokenClassification",
        ("logits",),
    ),
    Task(
        "question-answering",
        ("ForQuestionAnswering",),
        "AutoModelForQuestionAnswering",
        ("start_logits", "end_logits"),
    ),
)


# Tasks of optimum for models of images, by the suffix of their classes' names.
_OF_IMAGES = {
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "semantic-segmentation",
    "ForImageSegmentation": "image-segmentation",
    "ForMaskedImageModeling": "masked-im",
    "ForDepthEstimation": "depth-estimation",
    "Model": "feature-extraction",
}


def check_text(folder: Path) -> None:
    """Raises ModelError for a model of images, by its config.json, with the commands that it takes.

    Their settings have a number of channels or the size of an image, and no vocabulary.
    """
    config = read_json(folder / "config.json")
    has_text = any(key in config for key in ("vocab_size", "text_config"))
    if has_text or not any(key in config for key in ("num_channels", "image_size")):
        return
    name = architecture_of(folder) or str(config.get("model_type"))
    task = next((t for suffix, t in _OF_IMAGES.items() if name.endswith(suffix)), None)
    option = "" if task is None else f" --task {task}"
    place = shlex.quote(str(folder))
    raise ModelError(
        f"{name} is a model of images, and export takes models of text: "
        f"optimum-cli export onnx --model {place}{option} DIR, then "
        "qcompile compile DIR -o OUT --data images.npz"
    )


def task_named(name: str) -> Task:
    """The task of that name. Raises ModelError, which lists the known ones."""
    named = next((task for task in TASKS if task.name == name), None)
    if named is None:
        known = ", ".join(task.name for task in TASKS)
        raise ModelError(f"unknown task {name!r}, expected one of {known}")
    return named


def architecture_of(folder: Path) -> str | None:
    """The first of ``architectures`` in config.json, None where it names none."""
    names = read_json(folder / "config.json").get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) else None


def task_of(folder: Path) -> Task:
    """The task that ``architectures`` in config.json means. Raises ModelError if it is unknown.

    A folder of sentence-transformers (modules.json) holds an encoder, whatever it was trained as.
    """
    name = architecture_of(folder)
    for task in TASKS:
        if name is not None and task.is_of(name):
            return task
    if (folder / "modules.json").is_file():
        return TASKS[0]
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
