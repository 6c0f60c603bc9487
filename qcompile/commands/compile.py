"""qcompile compile MODEL -o OUT"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qcompile.commands import _compile_folder, _summary
from qcompile.commands._console import console, progress_bar
from qcompile.commands._options import (
    ACCURACY_GATES,
    PATH,
    data_options,
    gate_options,
    gates_from,
    output_options,
)
from qcompile.commands._recipe_options import cache_from, lock_from, recipe_from, recipe_options
from qcompile.commands._report_files import report_files, report_option
from qcompile.commands._summary import tuned_file
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.driver import compile_model
from qcompile.compiler.model_folder.compile_folder import Settings
from qcompile.compiler.stages.options import CompileOptions, Request
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
    qcompile searches for the fewest tensors whose precision must be raised. In a folder, every
    .onnx file is compiled, and configuration and tokenizer are copied.
    """
    recipe, gates = recipe_from(given), gates_from(given)
    options = options_from(given, lock_from(given, recipe))
    if options.dump_dir is not None:
        _make_folder(options.dump_dir)
    if given["model"].is_dir():
        _compile_folder.compile_folder(given, Settings(given["data"], recipe, gates, options))
        return
    out: Path = given["output"]
    reports = report_files(given, out)
    files = {"input model": given["model"], "output": out, **reports.named}
    if options.tune:
        files["tuned recipe"] = tuned_file(out)
    if options.search_state is not None:
        files["search state"] = options.search_state
    lock_file: Path | None = given["lock_file"]
    if lock_file is not None:
        files |= {"lock": lock_file, "lock's calibration": lockfile.sidecar(lock_file)}
    _check_distinct(files)
    for what, path in files.items():
        if what != "input model":
            atomic_write.check_writable(path)
    try:
        with progress_bar(given["quiet"] or given["as_json"]) as bar:
            request = Request(given["model"], given["data"], recipe, gates, options, bar)
            result = compile_model(request)
    except RejectedError as e:
        _summary.show_or_print(console(), given, e.result)
        raise
    _summary.deliver(console(), given, result, out, reports, lock_file)
    if options.cache is not None:
        options.cache.forget()
    if not (given["quiet"] or given["as_json"]):
        click.echo(f"next:    qcompile inspect {shlex.quote(str(out))}")


def options_from(given: dict[str, Any], locked: Lock | None) -> CompileOptions:
    """What is no part of the recipe."""
    out: Path = given["output"]
    seconds = given["search_time"] if _is_searched(given) and locked is None else 0.0
    return CompileOptions(
        tokenizer=given["tokenizer"],
        samples=given["samples"],
        batch_size=given["batch_size"],
        max_memory=given["max_memory"],
        threads=given["threads"],
        verify=not given["no_verify"],
        bench=not given["no_bench"],
        profile=report_files(given, out).page is not None,
        tune=given["tune"],
        force=given["force"],
        dump_dir=given["dump_passes"],
        metric=given["metric"],
        search_time=seconds,
        search_state=out.with_name(f"{out.stem}.search.json") if seconds else None,
        stem=out.stem,
        lock=locked,
        cache=cache_from(given),
        keep_calibration=given["lock_file"] is not None,
    )


def _is_searched(given: dict[str, Any]) -> bool:
    """A gate that the user has set, not one by default, is worth a search."""
    context = click.get_current_context()
    gates = (n for n in given if n in ACCURACY_GATES)
    return any(context.get_parameter_source(n) is not ParameterSource.DEFAULT for n in gates)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RecipeError(f"dump folder {str(path)!r}: {e.strerror}") from e


def _check_distinct(files: dict[str, Path]) -> None:
    """No file may stand for two things. Raises OutputError."""
    seen: dict[Path, str] = {}
    for what, path in files.items():
        other = seen.setdefault(path.resolve(), what)
        if other != what:
            raise OutputError(f"{what} {str(path)!r} is the {other} itself")
