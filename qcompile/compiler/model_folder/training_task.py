"""What a model is trained for, as config.json of its folder says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qcompile.compiler.model_folder import tasks
from qcompile.compiler.model_folder.sentence_pooling import MODULES
from qcompile.compiler.stages.options import Request
from qcompile.errors import ModelError

_CONFIG = "config.json"


def with_task(request: Request, folder: Path | None) -> Request:
    """The request with the configuration of a folder, if it trains.

    A folder of sentence-transformers holds an encoder, whatever it was trained as. ``folder``: of
    the model, or for an .onnx file that of its tokenizer; None for none. Raises ModelError where
    config.json cannot be read.
    """
    training = request.options.training
    if training is None or folder is None or training.config:
        return request
    if (folder / MODULES).is_file() or not (folder / _CONFIG).is_file():
        return request
    training = replace(training, config=tasks.read_json(folder / _CONFIG))
    return replace(request, options=replace(request.options, training=training))


def check_single(names: tuple[str, ...]) -> None:
    """Raises ModelError for a folder with several models: labels are for one."""
    if len(names) > 1:
        raise ModelError(
            f"training is for a folder with one model, but this one has {', '.join(names)}"
        )
