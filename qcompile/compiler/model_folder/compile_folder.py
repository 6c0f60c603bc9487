"""Compiles a folder file by file: each ONNX file gets its own report; all are compiled or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qcompile.compiler.driver import compile_model
from qcompile.compiler.model_folder import (
    layout,
    sentence_pooling,
    torch_export,
    training_task,
)
from qcompile.compiler.model_folder.atomic_folder import copy_companions
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.model_folder.torch_export import Exported
from qcompile.compiler.report.notes import Note
from qcompile.compiler.stages.options import CompileOptions, Progress, Request
from qcompile.compiler.stages.result import RejectedError, Result
from qcompile.data.feeds import input_specs
from qcompile.data.open_data import Data, open_data
from qcompile.errors import DataError, ModelError, QCompileError
from qcompile.ir.model_io import read_model


def with_models(
    folder: Folder, scratch: Path, progress: Progress
) -> tuple[Folder, Exported | None]:
    """The folder itself if it holds ONNX files; else one that is exported into ``scratch``.

    Raises ModelError, and GateError where the exported model differs from torch.
    """
    if folder.models:
        return folder, None
    if not folder.weights and not any("pickle" in s.reason for s in folder.skipped):
        raise ModelError(
            f"folder {str(folder.path)!r} holds no .onnx file, and no .safetensors weights to "
            "export from"
        )
    progress.step("export")
    copy_companions(folder, scratch)
    exported = torch_export.export_folder(folder, scratch)
    return layout.read_folder(scratch), exported


def compile_models(folder: Folder, request: Request) -> Iterator[tuple[str, Result]]:
    """(name, result) of each ONNX file of a folder, one at a time; ``request`` is for all of them.

    If the data fits some files only and no mode is asked for, the others are compiled without data,
    with a note in their reports. Raises what ``compile_model`` does, naming the file if there are
    several.
    """
    if request.options.training is not None:
        training_task.check_single(folder.models)
    request = _for_folder(request, folder)
    unfit = _unfit(folder, request)
    for name in folder.models:
        if len(folder.models) > 1:
            request.progress.step(name)
        yield name, _compile(folder, name, request, unfit.get(name))


def _for_folder(request: Request, folder: Folder) -> Request:
    """The request with the folder's tokenizer, unless it names one, the folder's pooling where it
    is to be that, the task to train for, and with a lock per result."""
    tokenizer = request.options.tokenizer or folder.tokenizer
    options = replace(request.options, tokenizer=tokenizer, keep_lock=True)
    recipe = sentence_pooling.with_folder_pooling(request.recipe, folder)
    return training_task.with_task(replace(request, recipe=recipe, options=options), folder.path)


def _unfit(folder: Folder, request: Request) -> dict[str, str]:
    """Files that the data cannot feed, and why. Raises DataError if it can feed none."""
    if request.data is None or len(folder.models) == 1:
        return {}
    reasons: dict[str, str] = {}
    for name in folder.models:
        try:
            _open(folder.path / name, request.data, request.options)
        except DataError as e:
            reasons[name] = str(e)
        except QCompileError as e:
            raise type(e)(f"{name}: {e}") from e
    if reasons and (len(reasons) == len(folder.models) or request.recipe.mode is not None):
        name, reason = next(iter(reasons.items()))
        raise DataError(f"{name}: {reason}")
    return reasons


def _open(path: Path, data: Data, options: CompileOptions) -> None:
    open_data(
        data,
        input_specs(read_model.load(path)),
        tokenizer=options.tokenizer,
        samples=options.samples,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )


def _compile(folder: Folder, name: str, request: Request, no_data: str | None) -> Result:
    """Compile one file; ``no_data``: why it is compiled without data, None with data."""
    where = f"{name}: " if len(folder.models) > 1 else ""
    options = _options(folder, name, request.options)
    request = replace(request, model=folder.path / name, name=name, options=options)
    if no_data is not None:
        note = Note("data-unfit", f"the data does not fit, so it was compiled without: {no_data}")
        request = replace(request, data=None, notes=(note,))
    try:
        return compile_model(request)
    except RejectedError as e:
        raise RejectedError(e.result, where) from e
    except QCompileError as e:
        raise type(e)(f"{where}{e}") from e


def _options(folder: Folder, name: str, options: CompileOptions) -> CompileOptions:
    """If there are several files, each has its own search state and its own dump folder."""
    if len(folder.models) == 1:
        return options
    flat, dumps = name.replace("/", "."), options.dump_dir
    state, bits = options.search_state, options.bits_state
    return replace(
        options,
        search_state=state and state.with_name(f"{flat}.{state.name}"),
        bits_state=bits and bits.with_name(f"{flat}.{bits.name}"),
        dump_dir=dumps and dumps / flat,
    )
