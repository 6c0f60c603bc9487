"""Builds what a request asks for, a file or a folder, and writes it: ``compile`` and ``train``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import click

from qcompile.commands import _compile_folder, _summary
from qcompile.commands._compile_arguments import BuildArguments
from qcompile.commands._console import progress_bar
from qcompile.commands._report_files import ReportFiles
from qcompile.compiler.config import lockfile
from qcompile.compiler.model_folder import hub
from qcompile.compiler.model_folder.model_file import compile_one
from qcompile.compiler.search import lowering_tuner
from qcompile.compiler.stages.options import CompileOptions, Request
from qcompile.compiler.stages.result import RejectedError
from qcompile.errors import OutputError, RecipeError
from qcompile.system import atomic_write


def build(arguments: BuildArguments, request: Request) -> None:
    """Compile the model or the folder, show the result and write it.

    Raises RejectedError where a gate failed: then nothing is written.
    """
    options = request.options
    if options.dump_dir is not None:
        _make_folder(options.dump_dir)
    if arguments.model.is_dir() or hub.may_be_name(arguments.source):
        _compile_folder.compile_folder(arguments, request)
        return
    arguments.check_single_file()
    out = arguments.output
    reports = arguments.reports(out)
    _check_files(arguments, options, reports)
    try:
        with progress_bar(shown=not arguments.quiet) as bar:
            result = compile_one(replace(request, progress=bar))
    except RejectedError as e:
        _summary.show_or_print(e.result, arguments)
        raise
    _summary.deliver(result, out, reports, arguments, arguments.lock_file)
    options.forget()
    if arguments.for_people:
        click.echo(f"next:    qcompile inspect {shlex.quote(str(out))}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RecipeError(f"dump folder {str(path)!r}: {e.strerror}") from e


def _check_files(arguments: BuildArguments, options: CompileOptions, reports: ReportFiles) -> None:
    """Check that every file can be written and has one purpose only. Raises OutputError."""
    files = {"output": arguments.output, **reports.named}
    if options.tune:
        files["tuned recipe"] = lowering_tuner.tuned_file(arguments.output)
    training = options.training
    states = {
        "search state": options.search_state,
        "state of bits": options.bits_state,
        "state of the training": None if training is None else training.state,
    }
    files |= {what: path for what, path in states.items() if path is not None}
    lock_file = arguments.lock_file
    if lock_file is not None:
        files |= {"lock": lock_file, "lock's calibration": lockfile.calibration_path(lock_file)}
    purposes = {arguments.model.resolve(): "input model"}
    if training is not None:
        purposes[training.data.resolve()] = "training data"
        if training.evaluation is not None:
            purposes[training.evaluation.resolve()] = "evaluation data"
    for what, path in files.items():
        place = path.resolve()
        other = next((used for known, used in purposes.items() if _same(place, known)), None)
        if other is not None:
            raise OutputError(f"{what} {str(path)!r} is the {other} itself")
        purposes[place] = what
    for path in files.values():
        atomic_write.check_writable(path)


def _same(one: Path, other: Path) -> bool:
    """True for one file, also by names that differ in case where the file system ignores it."""
    if one == other:
        return True
    spelled = str(one).casefold() == str(other).casefold()
    return spelled and one.exists() and other.exists() and one.samefile(other)
