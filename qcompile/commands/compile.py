"""qcompile compile MODEL -o OUT"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qcompile.commands import _compile_folder, _summary
from qcompile.commands._compile_arguments import CompileArguments
from qcompile.commands._console import progress_bar
from qcompile.commands._options import (
    PATH,
    LimitOfSize,
    data_options,
    gate_options,
    output_options,
)
from qcompile.commands._recipe_options import recipe_options
from qcompile.commands._report_files import ReportFiles, report_option
from qcompile.commands._summary import tuned_file
from qcompile.compiler.config import lockfile
from qcompile.compiler.driver import compile_model
from qcompile.compiler.stages.options import CompileOptions
from qcompile.compiler.stages.result import RejectedError
from qcompile.errors import OutputError, RecipeError
from qcompile.system import atomic_write


@click.command("compile")
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True,
              help="File to write; a folder if MODEL is one.")  # fmt: skip
@click.option("--data", help="Calibration data: .npz, folder of .npz, text, or module:function.")
@data_options
@recipe_options
@gate_options(compiling=True)
@click.option("--metric", help="module:function of feeds and outputs, for --min-metric.")
@click.option("--search-time", type=click.FloatRange(0), default=300, show_default=True,
              help="Most seconds to search for tensors that need more bits.")  # fmt: skip
@click.option("--max-size", type=LimitOfSize(), help="Largest file, as 16MB or as 18% of MODEL's: "
              "each weight gets the bits, 2 to 8, that keep outputs closest at that size. With an "
              "accuracy gate: the fewest bits that keep it.")  # fmt: skip
@click.option("--tune", is_flag=True, help="Time other lowering options here, on the data's "
              "shapes, and keep the fastest; also written to <stem>.recipe.yaml.")  # fmt: skip
@report_option
@click.option("--lock", "lock_file", type=PATH, help="Write a lock: --recipe LOCK builds the same "
              "bytes again, without data.")  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Do not compare with the float model.")
@click.option("--no-bench", is_flag=True, help="Do not time the result.")
@click.option("--force", is_flag=True, help="Write even if a gate fails.")
@click.option("--dump-passes", type=PATH, help="Folder for a dump of the graph after each pass.")
@output_options
def compile(**given: Any) -> None:
    """Compile MODEL, an .onnx file or a folder that holds some, into a quantized one.

    The result is compared with MODEL and timed. If it is less accurate or slower than the gates
    allow, nothing is written and the exit code is 1. If it fails an accuracy gate that was given,
    qcompile searches for the fewest tensors whose precision must be raised; --max-size searches for
    the bits of each weight. In a folder, every .onnx file is compiled, and configuration and
    tokenizer are copied.
    """
    arguments = CompileArguments(**given)
    request = arguments.make_request()
    options = request.options
    if options.dump_dir is not None:
        _make_folder(options.dump_dir)
    if arguments.model.is_dir():
        _compile_folder.compile_folder(arguments, request)
        return
    out = arguments.output
    reports = arguments.reports(out)
    _check_files(arguments, options, reports)
    try:
        with progress_bar(shown=arguments.for_people) as bar:
            result = compile_model(replace(request, progress=bar))
    except RejectedError as e:
        _summary.show_or_print(e.result, arguments)
        raise
    _summary.deliver(result, out, reports, arguments, arguments.lock_file)
    if options.cache is not None:
        options.cache.forget()
    if arguments.for_people:
        click.echo(f"next:    qcompile inspect {shlex.quote(str(out))}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RecipeError(f"dump folder {str(path)!r}: {e.strerror}") from e


def _check_files(
    arguments: CompileArguments, options: CompileOptions, reports: ReportFiles
) -> None:
    """Check that every file can be written and has one purpose only. Raises OutputError."""
    files = {"output": arguments.output, **reports.named}
    if options.tune:
        files["tuned recipe"] = tuned_file(arguments.output)
    states = {"search state": options.search_state, "state of bits": options.bits_state}
    files |= {what: path for what, path in states.items() if path is not None}
    lock_file = arguments.lock_file
    if lock_file is not None:
        files |= {"lock": lock_file, "lock's calibration": lockfile.calibration_path(lock_file)}
    purposes = {arguments.model.resolve(): "input model"}
    for what, path in files.items():
        other = purposes.setdefault(path.resolve(), what)
        if other != what:
            raise OutputError(f"{what} {str(path)!r} is the {other} itself")
    for path in files.values():
        atomic_write.check_writable(path)
