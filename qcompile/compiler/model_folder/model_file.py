"""The model file that a folder stands for, where a command or function takes one model."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TypeVar

from qcompile.compiler.driver import compile_model
from qcompile.compiler.model_folder import layout, training_task
from qcompile.compiler.model_folder.compile_folder import (
    check_before_export,
    compile_models,
    with_models,
)
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.stages.options import Request
from qcompile.compiler.stages.result import Result
from qcompile.errors import ModelError
from qcompile.ir.model_io.read_model import Source

_MOST_NAMED = 8
S = TypeVar("S", bound=Source)


def model_file(path: Path) -> Path:
    """The one ONNX file of a folder; a path that is no folder, as it is.

    Converted versions next to a model (``layout.read_folder``) do not count: name them to use them.
    Raises ModelError where a folder holds none or several.
    """
    if not path.is_dir():
        return path
    folder = layout.read_folder(path)
    found = list(folder.models) or _versions(folder)
    if len(found) == 1:
        return path / found[0]
    if found:
        names = ", ".join(str(path / name) for name in found[:_MOST_NAMED])
        rest = len(found) - _MOST_NAMED
        more = f" and {rest} more" if rest > 0 else ""
        raise ModelError(f"folder {str(path)!r} holds several models, name one: {names}{more}")
    hint = f"; first: qcompile export {shlex.quote(str(path))} -o DIR" if folder.weights else ""
    raise ModelError(f"folder {str(path)!r} holds no .onnx file{hint}")


def _versions(folder: Folder) -> list[str]:
    """Converted versions of a model that the folder itself holds as torch weights only."""
    passed_over = (Path(skipped.name) for skipped in folder.skipped)
    return [
        name.as_posix()
        for name in passed_over
        if name.suffix == ".onnx" and not name.name.startswith(".")
    ]


def model_source(source: S) -> S | Path:
    """A model as functions take it, in place of a folder its one model. Raises ModelError."""
    return model_file(Path(source)) if isinstance(source, str | Path) else source


def compile_one(request: Request) -> Result:
    """Compile a model, or the one model of a folder with the folder's tokenizer and pooling.

    Torch weights alone are exported first. Raises what ``compile_model`` does, and ModelError where
    a folder holds none or several.
    """
    path = request.model
    if not isinstance(path, str | Path) or not Path(path).is_dir():
        return compile_model(training_task.with_task(request, request.tokenizer))
    folder = layout.read_folder(Path(path))
    if len(folder.models) > 1 and request.options.training is None:
        model_file(Path(path))  # its error says which to name
    with tempfile.TemporaryDirectory() as scratch:
        check_before_export(folder, request)
        folder, _ = with_models(folder, Path(scratch), request.progress)
        (compiled,) = compile_models(folder, request)
        return compiled.result
