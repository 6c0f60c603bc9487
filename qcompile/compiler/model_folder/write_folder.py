"""Compiles a model folder into another one, or adds variants to it: ``compile`` and ``train``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated

from qcompile import __version__
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.config.variants import Variant, variants_named
from qcompile.compiler.model_folder import atomic_folder, hub, in_place, sentence_pooling, tasks
from qcompile.compiler.model_folder.compile_folder import (
    CompiledFile,
    check_before_export,
    compile_models,
    file_names,
    with_models,
)
from qcompile.compiler.model_folder.hub import Source
from qcompile.compiler.model_folder.torch_export import MODEL, FolderAccount, VariantFile
from qcompile.compiler.report import model_card
from qcompile.compiler.report.model_card import CARD, CardFacts, CardRow
from qcompile.compiler.report.report import Report
from qcompile.compiler.search import lowering_tuner
from qcompile.compiler.stages.options import CompileOptions, Request
from qcompile.compiler.stages.result import Result
from qcompile.data.open_data import Data
from qcompile.errors import ModelError
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.session import custom_operators
from qcompile.system import atomic_write
from qcompile.system.json_values import Record, members
from qcompile.system.progress import Progress, Silent
from qcompile.system.resume_cache import Cache

_SIDE_FILES = (".report.json", ".lock.yaml", ".recipe.yaml")
Extra = Callable[[Path, Result], None]


def _nothing(_path: Path, _result: Result) -> None:
    """No files outside of the folder."""


@dataclass(frozen=True)
class CompiledFolder(Record):
    """What ``compile`` made of a folder: the report of each file."""

    account: FolderAccount
    files: dict[str, Report]
    uploaded: Annotated[str | None, "address of the commit on the hub"] = None

    JSON = members("**account files uploaded?")


@dataclass(frozen=True)
class FolderRequest:
    """A folder to compile. ``request``: for each of its models.

    out: the folder to write; with ``variants`` it may be the source itself. base_model: the float
    model's name on the hub, for the model card. push: a repository to upload to, or None. extra: is
    called with each model's path and result before it is written, for files outside of ``out``.
    """

    source: Source
    out: Path
    request: Request
    variants: tuple[Variant, ...] = ()
    base_model: str | None = None
    push: str | None = None
    extra: Extra = _nothing

    @property
    def in_place(self) -> bool:
        """True where files are added to the source."""
        return bool(self.variants) and self.out.resolve() == self.source.folder.path.resolve()


def compile_folder(
    source: str | Path,
    out: str | Path,
    data: Data | None = None,
    *,
    variants: Sequence[str] = (),
    revision: str | None = None,
    base_model: str | None = None,
    push: str | None = None,
    recipe: Recipe | str | Path | None = None,
    gates: Gates | None = None,
    options: CompileOptions | None = None,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> CompiledFolder:
    """Compile a model folder, or a model of the Hugging Face hub, into the folder ``out``.

    ``source``: a folder in transformers layout, or a name on the hub, of which ``revision`` is a
    branch, tag or commit. ``variants``: which files to make of each model (docs/variants.md);
    without, each has the float model's name. With variants, ``out`` may be the source: then only
    these files are added. ``base_model``: the float model's name on the hub, for the model card,
    where ``source`` is not that name. ``push``: a repository on the hub, ORG/NAME, to which the
    result is uploaded. All else as in ``compile``; pooling, bits and other settings are in
    ``recipe``.

    Returns an account of the folder, with the report of each file in ``files``. Raises what
    ``compile`` does, and OutputError where ``out`` cannot be written or uploaded.
    """
    if push is not None:
        hub.check_push(push)
    chosen = lockfile.recipe_of(recipe)
    options, lock = options or CompileOptions(), lockfile.requested_lock(recipe, chosen, "recipe")
    request = Request(
        Path(source),
        data,
        recipe=chosen,
        gates=gates or Gates(),
        options=options if lock is None else replace(options, lock=lock),
        progress=progress or Silent(),
    )
    with custom_operators(custom_ops):
        found = hub.find_source(source, revision)
        made = variants_named(variants)
        folder = write_folder(
            FolderRequest(found, Path(out), request, made, base_model=base_model, push=push)
        )
    request.options.forget()
    return folder


def write_folder(asked: FolderRequest) -> CompiledFolder:
    """Compile, write all files or none, and upload them if asked to.

    Raises as ``compile_folder``.
    """
    folder, progress = asked.source.folder, asked.request.progress
    with (
        _stage(asked) as stage,
        tempfile.TemporaryDirectory(prefix=".qcompile.", dir=stage.parent) as scratch,
    ):
        place = Path(scratch) / "models"
        place.mkdir()
        check_before_export(folder, asked.request)
        filled, exported = with_models(folder, place, progress)
        own = () if asked.in_place else tuple(n for n in filled.companions if n != CARD)
        folder = replace(folder, companions=own)
        atomic_folder.copy_companions(replace(filled, companions=own), stage)
        request = _sharing_calibration(asked, Path(scratch))
        files = []
        for compiled in compile_models(filled, request, asked.variants):
            _write_file(compiled, stage, asked.extra)
            files.append(compiled)
        made = _variant_files(files) if asked.variants else None
        account = FolderAccount(asked.source.name, folder, exported, made)
        if not asked.in_place:
            card = _card(asked, files).encode(errors="replace")
            (stage / CARD).write_bytes(card)
        atomic_folder.write_manifest(stage, account.to_dict())
        names = [p.relative_to(stage).as_posix() for p in sorted(stage.rglob("*")) if p.is_file()]
    reports = {f.name: f.result.report for f in files}
    if asked.push is None:
        return CompiledFolder(account, reports)
    progress.step("upload")
    message = f"{', '.join(reports)}, compiled by qcompile {__version__}"
    return CompiledFolder(account, reports, hub.push(asked.push, asked.out, names, message))


def _stage(asked: FolderRequest) -> AbstractContextManager[Path]:
    """The temporary folder that is filled. Raises OutputError where ``out`` cannot be written."""
    source = asked.source.folder
    if not asked.in_place:
        return atomic_folder.folder_to_fill(asked.out, source.path)
    names = file_names(source.models or (MODEL,), asked.variants)
    sides = [str(PurePosixPath(n).with_suffix(s)) for n in names for s in _SIDE_FILES]
    return in_place.folder_to_extend(asked.out, (*names, *sides))


def _sharing_calibration(asked: FolderRequest, scratch: Path) -> Request:
    """The request; with several variants and no cache, with one for this build alone, so that
    what has been calibrated for one variant serves the others."""
    request = asked.request
    if len(asked.variants) < 2 or request.options.cache is not None:
        return request
    return replace(request, options=replace(request.options, cache=Cache(scratch / "calibration")))


def _write_file(compiled: CompiledFile, stage: Path, extra: Extra) -> None:
    """A model with its report, lock and tuned recipe; the model last."""
    path, result = stage / compiled.name, compiled.result
    path.parent.mkdir(parents=True, exist_ok=True)
    extra(path, result)
    report = path.with_name(f"{path.stem}.report.json")
    atomic_write.write_atomic(report, result.report.to_json().encode())
    result.save_lock(path.with_name(f"{path.stem}.lock.yaml"), light=True)
    lowering_tuner.save_tuned(result.report, path)
    result.save(path)


def _variant_files(files: Sequence[CompiledFile]) -> dict[str, VariantFile]:
    return {
        f.name: VariantFile(f.variant.name, f.source, f.variant.purpose)
        for f in files
        if f.variant is not None
    }


def _card(asked: FolderRequest, files: Sequence[CompiledFile]) -> str:
    folder = asked.source.folder
    float_card = ""
    if CARD in folder.companions:
        with (folder.path / CARD).open(encoding="utf-8", errors="replace") as file:
            float_card = file.read(model_card.MOST)
    try:
        task = tasks.task_of(folder.path)
    except ModelError:
        task = None
    facts = CardFacts(
        name=(asked.push or asked.out.resolve().name).rpartition("/")[2],
        repository=asked.push,
        base_model=asked.base_model or asked.source.hub_name,
        float_card=float_card,
        task=task.name if task else None,
        auto_class=task.auto if task else None,
        embeds_sentences=sentence_pooling.MODULES in folder.companions,
    )
    rows = [
        CardRow(
            f.name,
            f.variant.purpose if f.variant else "",
            f.variant.dtype if f.variant else "",
            f.result.report,
        )
        for f in files
    ]
    return model_card.model_card(facts, rows)
