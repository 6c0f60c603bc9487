"""``qcompile compile`` for a model folder: compiles it into another folder, file by file."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import click

from qcompile.commands import _summary
from qcompile.commands._compile_arguments import BuildArguments
from qcompile.commands._console import print_json, progress_bar
from qcompile.commands._printable import printable
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.variants import Variant, variants_named
from qcompile.compiler.model_folder import hub, layout
from qcompile.compiler.model_folder.compile_folder import file_names
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.model_folder.write_folder import (
    CompiledFolder,
    FolderRequest,
    write_folder,
)
from qcompile.compiler.stages.options import Request
from qcompile.compiler.stages.result import RejectedError, Result
from qcompile.errors import OutputError
from qcompile.system import atomic_write

_SHOWN = 5


def compile_folder(arguments: BuildArguments, request: Request) -> None:
    """Compile every ONNX file of a folder into a folder of the same layout, written atomically.

    If it holds torch weights only, they are exported first.
    """
    try:
        with progress_bar(shown=not arguments.quiet) as bar:
            written = _build(arguments, replace(request, progress=bar))
    except RejectedError as e:
        _summary.show_or_print(e.result, arguments)
        raise
    request.options.forget()
    if arguments.as_json:
        print_json(written)
    elif not arguments.quiet:
        _show(arguments, written)


def _build(arguments: BuildArguments, request: Request) -> CompiledFolder:
    """Write the folder, and upload it if asked to."""
    if arguments.push is not None:
        hub.check_push(arguments.push)
    variants = variants_named(arguments.variants)
    if not arguments.model.is_dir():
        request.progress.step("fetch")
    source = hub.find_source(arguments.source, arguments.revision)
    _check_extras(arguments, source.folder, variants)

    def write_extras(path: Path, result: Result) -> None:
        arguments.reports(path).write(result.report)
        if arguments.lock_file is not None:
            result.save_lock(arguments.lock_file)

    return write_folder(
        FolderRequest(
            source,
            arguments.output,
            request,
            variants,
            base_model=arguments.base_model,
            push=arguments.push,
            extra=write_extras,
        )
    )


def _check_extras(arguments: BuildArguments, folder: Folder, variants: tuple[Variant, ...]) -> None:
    """Files outside the output folder are for one model only. Raises OutputError.

    They must not be inside the input or output folder, which is replaced. ``--report`` is written
    in addition to the report in the folder.
    """
    files = [("--report", path) for path in arguments.report_files]
    if arguments.lock_file is not None:
        files.append(("--lock", arguments.lock_file))
        files.append(("calibration of --lock", lockfile.calibration_path(arguments.lock_file)))
    for option, path in files:
        if len(file_names(folder.models, variants)) > 1:
            raise OutputError(f"{option} is for one model, but several files are written")
        for place in (folder.path, arguments.output):
            if path.resolve().is_relative_to(place.resolve()):
                raise OutputError(f"{option} {str(path)!r} is inside folder {str(place)!r}")
        atomic_write.check_writable(path)


def _show(arguments: BuildArguments, written: CompiledFolder) -> None:
    out, account = arguments.output, written.account
    if account.exported is not None:
        click.echo(f"exported: {account.exported}")
        for note in account.exported.notes:
            click.echo(f"note: {note}")
    for name, report in written.files.items():
        if account.variants is not None:
            click.echo(f"{printable(name)}: {account.variants[name].purpose}")
        _summary.show(report)
    passed_over = list(account.folder.passed_over.items())
    for name, reason in passed_over[:_SHOWN]:
        click.echo(f"skipped:  {name}: {reason}")
    if len(passed_over) > _SHOWN:
        click.echo(f"skipped:  {len(passed_over) - _SHOWN} more, in {layout.MANIFEST}")
    models = ", ".join(written.files)
    copied = f"{len(account.folder.companions)} files copied"
    click.echo(f"written: {out}: {models}, with reports and locks; {copied}")
    if written.uploaded is not None:
        click.echo(f"uploaded: {written.uploaded}")
    click.echo(f"next:    qcompile inspect {shlex.quote(str(out / next(iter(written.files))))}")
