"""What a model is trained for, as its folder says: config.json, and the pooling of modules.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qcompile.compiler.config.recipe import AUTO, Recipe
from qcompile.compiler.model_folder import layout, sentence_pooling, tasks
from qcompile.compiler.stages.options import Request
from qcompile.errors import ModelError

_CONFIG = "config.json"


def with_task(request: Request, folder: Path | None) -> Request:
    """The request with the configuration and the pooling of a folder, if it trains.

    folder: of the model, or for an .onnx file that of its tokenizer; None for none. Raises
    ModelError where one of its files cannot be read.
    """
    training = request.options.training
    if training is None or folder is None or training.config:
        return request
    if (folder / _CONFIG).is_file():
        training = replace(training, config=tasks.read_json(folder / _CONFIG))
    if (folder / sentence_pooling.MODULES).is_file():
        asked = sentence_pooling.with_folder_pooling(
            Recipe(pooling=AUTO), layout.read_folder(folder)
        )
        training = replace(training, pooling=asked.pooling or "mean")
        training = replace(training, config={})  # an encoder, whatever its class was
    return replace(request, options=replace(request.options, training=training))


def check_single(names: tuple[str, ...]) -> None:
    """Raises ModelError for a folder with several models: labels are for one."""
    if len(names) > 1:
        raise ModelError(
            f"training is for a folder with one model, but this one has {', '.join(names)}"
        )
