"""``qcompile compile`` for a model folder: compiles it into another folder, file by file."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click

from qcompile.commands import _summary
from qcompile.commands._compile_arguments import BuildArguments
from qcompile.commands._console import print_json, progress_bar
from qcompile.compiler.config import lockfile
from qcompile.compiler.model_folder import atomic_folder, layout
from qcompile.compiler.model_folder.compile_folder import compile_models, with_models
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.model_folder.torch_export import FolderAccount
from qcompile.compiler.report.report import Report
from qcompile.compiler.stages.options import Request
from qcompile.compiler.stages.result import RejectedError
from qcompile.errors import OutputError
from qcompile.system import atomic_write
from qcompile.system.json_values import Record, members

_SHOWN = 5


@dataclass(frozen=True)
class CompiledFolder(Record):
    """What ``compile`` made of a folder: the report of each file."""

    account: FolderAccount
    files: dict[str, Report]

    JSON = members("**account files")


def compile_folder(arguments: BuildArguments, request: Request) -> None:
    """Compile every ONNX file of a folder into a folder of the same layout, written atomically.

    If it holds torch weights only, they are exported first.
    """
    try:
        reports, account = _build(arguments, request)
    except RejectedError as e:
        _summary.show_or_print(e.result, arguments)
        raise
    request.options.forget()
    if arguments.as_json:
        print_json(CompiledFolder(account, reports))
    elif not arguments.quiet:
        _show(arguments.output, reports, account)


def _build(arguments: BuildArguments, request: Request) -> tuple[dict[str, Report], FolderAccount]:
    """Write the folder; return the reports by file name, and the account of the inputs."""
    source, out = arguments.model, arguments.output
    with (
        atomic_folder.folder_to_fill(out, source) as stage,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=stage.parent) as scratch,
        progress_bar(shown=arguments.for_people) as bar,
    ):
        input_folder = layout.read_folder(source)
        _check_extras(arguments, input_folder)
        folder, exported = with_models(input_folder, Path(scratch), bar)
        atomic_folder.copy_companions(folder, stage)
        reports = _compile_all(arguments, folder, replace(request, progress=bar), stage)
        account = FolderAccount(source.resolve().name, input_folder, exported)
        atomic_folder.write_manifest(stage, account.to_dict())
    return reports, account


def _check_extras(arguments: BuildArguments, folder: Folder) -> None:
    """Files outside the output folder are for one model only. Raises OutputError.

    They must not be inside the input or output folder, which is replaced. ``--report`` is written
    in addition to the report in the folder.
    """
    files = [("--report", path) for path in arguments.report_files]
    if arguments.lock_file is not None:
        files.append(("--lock", arguments.lock_file))
        files.append(("calibration of --lock", lockfile.calibration_path(arguments.lock_file)))
    for option, path in files:
        if len(folder.models) > 1:
            raise OutputError(f"{option} is for one model, but the folder holds several")
        for place in (arguments.model, arguments.output):
            if path.resolve().is_relative_to(place.resolve()):
                raise OutputError(f"{option} {str(path)!r} is inside folder {str(place)!r}")
        atomic_write.check_writable(path)


def _compile_all(
    arguments: BuildArguments, folder: Folder, request: Request, stage: Path
) -> dict[str, Report]:
    reports = {}
    for name, result in compile_models(folder, request):
        path = stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments.reports(path).write(result.report)
        inside = path.with_name(f"{path.stem}.report.json")
        atomic_write.write_atomic(inside, result.report.to_json().encode())
        result.save_lock(path.with_name(f"{path.stem}.lock.yaml"), light=True)
        if arguments.lock_file is not None:
            result.save_lock(arguments.lock_file)
        _summary.save_tuned(result.report, path)
        result.save(path)
        reports[name] = result.report
    return reports


def _show(out: Path, reports: dict[str, Report], account: FolderAccount) -> None:
    if account.exported is not None:
        click.echo(f"exported: {account.exported}")
        for note in account.exported.notes:
            click.echo(f"note: {note}")
    for report in reports.values():
        _summary.show(report)
    passed_over = list(account.folder.passed_over.items())
    for name, reason in passed_over[:_SHOWN]:
        click.echo(f"passed over: {name}: {reason}")
    if len(passed_over) > _SHOWN:
        click.echo(f"passed over: {len(passed_over) - _SHOWN} more, in {layout.MANIFEST}")
    models = ", ".join(reports)
    copied = f"{len(account.folder.companions)} files copied"
    click.echo(f"written: {out}: {models}, with reports and locks; {copied}")
    click.echo(f"next:    qcompile inspect {shlex.quote(str(out / next(iter(reports))))}")
