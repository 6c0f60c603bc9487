"""Compiles a folder file by file: each ONNX file with its own report, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.driver import compile_model
from qcompile.compiler.model_folder import layout, torch_export
from qcompile.compiler.model_folder.atomic_folder import copy_companions
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.model_folder.torch_export import Exported
from qcompile.compiler.report.notes import Note
from qcompile.compiler.stages.options import CompileOptions, Progress, Request
from qcompile.compiler.stages.result import RejectedError, Result
from qcompile.data.feeds import input_specs
from qcompile.data.open_data import Data, open_data
from qcompile.errors import DataError, ModelError, QCompileError
from qcompile.ir import Refusal
from qcompile.ir.model_io import read_model
from qcompile.runtime.evaluation.closeness import Gates


@dataclass(frozen=True)
class Settings:
    """What every file of the folder is compiled with."""

    data: Data | None
    recipe: Recipe
    gates: Gates
    options: CompileOptions


def with_models(
    folder: Folder, scratch: Path, progress: Progress
) -> tuple[Folder, Exported | None]:
    """The folder itself where it holds ONNX files; else one that is exported into ``scratch``.

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
    made = torch_export.export(folder, scratch)
    return layout.read_folder(scratch), made


def compile_models(
    folder: Folder, settings: Settings, progress: Progress
) -> Iterator[tuple[str, Result]]:
    """(name, result) of each ONNX file of a folder, one at a time.

    A file that the data does not fit is compiled without, where another one does fit and no mode
    is asked for; its report says so. Raises what ``compile_model`` does, naming the file where
    there are several.
    """
    settings = _for_folder(settings, folder)
    unfit = _unfit(folder, settings)
    for name in folder.models:
        if len(folder.models) > 1:
            progress.step(name)
        yield name, _compile(folder, name, settings, unfit.get(name), progress)


def _for_folder(settings: Settings, folder: Folder) -> Settings:
    """Text is tokenized as the folder says, unless told otherwise; each result has its lock."""
    tokenizer = settings.options.tokenizer or folder.tokenizer
    options = replace(settings.options, tokenizer=tokenizer, keep_lock=True)
    return replace(settings, options=options)


def _unfit(folder: Folder, settings: Settings) -> dict[str, Refusal]:
    """Files that the data cannot feed, and why. Raises DataError where it feeds none."""
    if settings.data is None or len(folder.models) == 1:
        return {}
    found: dict[str, Refusal] = {}
    for name in folder.models:
        try:
            _open(folder.path / name, settings)
        except DataError as e:
            found[name] = Refusal(str(e))
        except QCompileError as e:
            raise type(e)(f"{name}: {e}") from e
    if found and (len(found) == len(folder.models) or settings.recipe.mode is not None):
        name, refusal = next(iter(found.items()))
        raise DataError(refusal.about(name).reason)
    return found


def _open(path: Path, settings: Settings) -> None:
    options = settings.options
    open_data(
        settings.data if settings.data is not None else (),
        input_specs(read_model.load(path)),
        tokenizer=options.tokenizer,
        samples=options.samples,
        batch_size=options.batch_size,
    )


def _compile(
    folder: Folder, name: str, settings: Settings, unfit: Refusal | None, progress: Progress
) -> Result:
    data = settings.data if unfit is None else None
    where = f"{name}: " if len(folder.models) > 1 else ""
    notes: tuple[Note, ...] = ()
    if unfit is not None:
        text = unfit.about("the data cannot feed it, compiled without").reason
        notes = (Note("data-unfit", text),)
    request = Request(
        folder.path / name,
        data,
        settings.recipe,
        settings.gates,
        _options(folder, name, settings.options),
        progress,
        name=name,
        notes=notes,
    )
    try:
        return compile_model(request)
    except RejectedError as e:
        raise RejectedError(e.result, where) from e
    except QCompileError as e:
        raise type(e)(f"{where}{e}") from e


def _options(folder: Folder, name: str, options: CompileOptions) -> CompileOptions:
    """Where there are several files, each keeps its own state of a search and its own dumps."""
    if len(folder.models) == 1:
        return options
    flat, state, dumps = name.replace("/", "."), options.search_state, options.dump_dir
    return replace(
        options,
        search_state=state and state.with_name(f"{flat}.{state.name}"),
        dump_dir=dumps and dumps / flat,
    )
