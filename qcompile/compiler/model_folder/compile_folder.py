"""Compiles a folder file by file: each ONNX file gets its own report; all are compiled or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from qcompile.calibration.calibration_file import Calibration
from qcompile.compiler.cluster.workers import LOCAL, Kit, Site, Task
from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.config.variants import Variant
from qcompile.compiler.driver import compile_model
from qcompile.compiler.model_folder import (
    layout,
    sentence_pooling,
    snapshot_files,
    torch_export,
    training_task,
)
from qcompile.compiler.model_folder.atomic_folder import copy_companions
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.model_folder.position_table import position_rows
from qcompile.compiler.model_folder.torch_export import Exported
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.report import Report
from qcompile.compiler.stages.options import CompileOptions, Request
from qcompile.compiler.stages.result import RejectedError, Result
from qcompile.data import open_data
from qcompile.data.feeds import input_specs
from qcompile.data.open_data import Data
from qcompile.errors import DataError, ModelError, QCompileError, RecipeError
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.hub_cache import repository_around
from qcompile.ir.model_io.write_model import ModelFiles
from qcompile.system.progress import Progress, Silent
from qcompile.system.temporary_folder import TemporaryFolder


@dataclass(frozen=True)
class CompiledFile:
    """One file of a compiled folder. name: of the file. source: the float model's file. variant:
    None for a file that has the float model's name."""

    name: str
    source: str
    variant: Variant | None
    result: Result


@dataclass(frozen=True)
class _Job:
    """One file to compile. no_data: why it is compiled without data, None with data."""

    name: str
    source: str
    variant: Variant | None
    no_data: str | None


def check_before_export(folder: Folder, request: Request) -> None:
    """Raise DataError, before minutes of work, for data that no model of the folder can take."""
    options, training = request.options, request.options.training
    evaluation = None if training is None else training.evaluation
    for data in (d for d in (request.data, evaluation) if d is not None):
        open_data.check_text(
            data,
            tokenizer=options.tokenizer or folder.tokenizer,
            samples=options.samples,
            max_length=options.max_length,
            text_columns=options.text_columns,
            positions=None if folder.models else position_rows(folder),
            seed=request.recipe.seed,
            progress=request.progress,
        )


def with_models(
    folder: Folder, scratch: Path, progress: Progress
) -> tuple[Folder, Exported | None]:
    """The folder itself if it holds ONNX files; else one that is exported into ``scratch``.

    ONNX Runtime refuses external data behind links, so the models of a snapshot in the hub's cache
    get into ``scratch`` too. Raises ModelError, and GateError where the exported model differs from
    torch.
    """
    if folder.models:
        if repository_around(folder.path) is None:
            return folder, None
        copy_companions(folder, scratch)
        snapshot_files.place_models(folder, scratch)
        return layout.read_folder(scratch), None
    if not folder.weights and not any("pickle" in s.reason for s in folder.skipped):
        raise ModelError(
            f"folder {str(folder.path)!r} holds no .onnx file, and no .safetensors weights to "
            "export from"
        )
    progress.step("export")
    copy_companions(folder, scratch)
    exported = torch_export.export_folder(folder, scratch)
    return layout.read_folder(scratch), exported


def file_names(models: Sequence[str], variants: Sequence[Variant]) -> dict[str, str]:
    """The files that are written, each with the float model that it is made from."""
    if not variants:
        return {name: name for name in models}
    return {variant.file(name): name for name in models for variant in variants}


def compile_models(
    folder: Folder, request: Request, variants: Sequence[Variant] = ()
) -> Iterator[CompiledFile]:
    """Compile each ONNX file of a folder, one at a time; ``request`` is for all of them.

    ``variants``: those that are made of each file; without, one file is, under the same name. If
    the data fits some files only and no mode is asked for, the others are compiled without data,
    with a note in their reports. Raises what ``compile_model`` does, naming the file if there are
    several.
    """
    if request.options.training is not None:
        training_task.check_single(folder.models)
    request = _for_folder(request, folder)
    requests = {v.name: _for_variant(request, v) for v in variants}
    unfit = _unfit(folder, request)
    jobs = [
        _Job(variant.file(name) if variant else name, name, variant, unfit.get(name))
        for name in folder.models
        for variant in (variants or (None,))
    ]
    task = _FolderTask(folder, request, requests, single=len(jobs) == 1)
    workers = request.options.workers if _is_untimed(request) and len(jobs) > 1 else LOCAL
    with closing(workers.map(task, jobs)) as results:
        for job, result in zip(jobs, results, strict=True):
            yield CompiledFile(job.name, job.source, job.variant, result)


def _is_untimed(request: Request) -> bool:
    """True where workers can take a file each: nothing is timed, and they can read the data.

    Otherwise each file is compiled here, with its calibration and measurements by all workers.
    """
    options, data = request.options, request.data
    timed = options.bench or options.tune or options.training is not None
    return not timed and (data is None or isinstance(data, str | Path))


@dataclass(frozen=True)
class _FolderTask(Task[_Job, Result]):
    """Compiles a file each. ``requests``: of variants, by name; ``request``: of all others."""

    folder: Folder
    request: Request
    requests: Mapping[str, Request]
    single: bool

    def here(self, item: _Job) -> Result:
        """Compile in this process, with its own client for calibration if there is one."""
        if not self.single:
            self.request.progress.step(item.name)
        asked = self.requests[item.variant.name] if item.variant else self.request
        return _compile(self.folder, item, asked, single=self.single)

    def kit(self) -> Kit:
        """No files: folder, tokenizer and data are on shared storage."""
        folder = replace(self.folder, path=self.folder.path.resolve())
        requests = {name: _for_worker(r) for name, r in self.requests.items()}
        sent = _FolderTask(folder, _for_worker(self.request), requests, self.single)
        return Kit({}, sent._open)

    def label(self, item: _Job) -> str:
        """The name of the file."""
        return item.name

    def received(self, items: Sequence[_Job], answer: _SentResult) -> Sequence[Result]:
        """The result, with its files here. Raises RejectedError as the worker did."""
        [item] = items
        self.request.progress.step(item.name)
        result = answer.result()
        if answer.rejected:
            raise RejectedError(result, f"{item.name}: ")
        return [result]

    def _open(self, _site: Site) -> Callable[[_Job], _SentResult]:
        return self._compiled

    def _compiled(self, item: _Job) -> _SentResult:
        try:
            return _SentResult.of(self.here(item), rejected=False)
        except RejectedError as e:
            return _SentResult.of(e.result, rejected=True)


def _for_worker(request: Request) -> Request:
    """The request without what belongs to this process."""
    options, data = request.options, request.data
    if isinstance(data, str | Path) and Path(data).exists():
        data = Path(data).resolve()
    options = replace(
        options,
        client=None,
        cache=None,
        tokenizer=_absolute(options.tokenizer),
        search_state=_absolute(options.search_state),
        bits_state=_absolute(options.bits_state),
        dump_dir=_absolute(options.dump_dir),
    )
    return replace(request, data=data, options=options, progress=Silent())


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()


@dataclass(frozen=True)
class _SentResult:
    """A result as it travels: the bytes of its files by name, the model's first."""

    files: Mapping[str, bytes]
    report: Report
    lock: Lock | None
    calibration: Calibration | None
    rejected: bool

    @classmethod
    def of(cls, result: Result, *, rejected: bool) -> _SentResult:
        written = result.written
        paths = [p for p in (written.path, written.data) if p is not None]
        files = {p.name: p.read_bytes() for p in paths}
        return cls(files, result.report, result.lock, result.calibration, rejected)

    def result(self) -> Result:
        """The same in a temporary folder of this process."""
        folder = TemporaryFolder()
        paths = [folder.path / name for name in self.files]
        for path in paths:
            path.write_bytes(self.files[path.name])
        written = ModelFiles(paths[0], paths[1] if len(paths) > 1 else None, folder)
        return Result(written, self.report, self.lock, self.calibration)


def _for_variant(request: Request, variant: Variant) -> Request:
    """The request with a variant's settings.

    Raises RecipeError where the recipe, or a lock's, contradicts them.
    """
    recipe = variant.recipe(request.recipe)
    if request.options.lock is not None and recipe != request.recipe:
        raise RecipeError(
            f"the lock is not that of variant {variant.name!r}: each variant has its own, next "
            "to its file"
        )
    return replace(request, recipe=recipe, gates=variant.own_gates(request.gates))


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
            _open(folder.path / name, request.data, request)
        except DataError as e:
            reasons[name] = str(e)
        except QCompileError as e:
            raise type(e)(f"{name}: {e}") from e
    if reasons and (len(reasons) == len(folder.models) or request.recipe.mode is not None):
        name, reason = next(iter(reasons.items()))
        raise DataError(f"{name}: {reason}")
    return reasons


def _open(path: Path, data: Data, request: Request) -> None:
    options = request.options
    open_data.open_data(
        data,
        input_specs(read_model.load(path)),
        tokenizer=options.tokenizer,
        samples=options.samples,
        batch_size=options.batch_size,
        max_length=options.max_length,
        text_columns=options.text_columns,
        seed=request.recipe.seed,
        progress=request.progress,
    )


def _compile(folder: Folder, job: _Job, request: Request, *, single: bool) -> Result:
    """Compile one file, the only one if ``single``."""
    where = "" if single else f"{job.name}: "
    options = request.options if single else _own_files(job.name, request.options)
    if job.variant is not None:
        options = replace(options, stem=PurePosixPath(job.name).stem)
    request = replace(request, model=folder.path / job.source, name=job.source, options=options)
    if job.no_data is not None:
        text = f"the data does not fit, so it was compiled without: {job.no_data}"
        request = replace(request, data=None, notes=(Note("data-unfit", text),))
    try:
        return compile_model(request)
    except RejectedError as e:
        raise RejectedError(e.result, where) from e
    except QCompileError as e:
        raise type(e)(f"{where}{e}") from e


def _own_files(name: str, options: CompileOptions) -> CompileOptions:
    """Options of one of several files: each has its own search state and its own dump folder."""
    flat, dumps = name.replace("/", "."), options.dump_dir
    state, bits = options.search_state, options.bits_state
    return replace(
        options,
        search_state=state and state.with_name(f"{flat}.{state.name}"),
        bits_state=bits and bits.with_name(f"{flat}.{bits.name}"),
        dump_dir=dumps and dumps / flat,
    )
