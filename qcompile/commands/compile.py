"""qcompile compile MODEL -o OUT"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from qcompile import export
from qcompile.api import MODES
from qcompile.commands import _result
from qcompile.commands._shared import (
    PATH,
    Size,
    console,
    data_options,
    gate_options,
    gates_from,
    output_options,
    progress_bar,
)
from qcompile.compiler import compile_job
from qcompile.errors import OutputError, RecipeError
from qcompile.job import Options, RejectedError
from qcompile.recipe import Recipe, merged, names, read

_RECIPE_OPTIONS = ("target", "mode", "calibrator", "pipeline", "seed")


@click.command("compile")
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="File to write.")
@click.option("--data", help="Calibration data: .npz, folder of .npz, text, or module:function.")
@data_options
@click.option("--target", help="cpu, qdq: see `qcompile targets`.  [default: cpu]")
@click.option("--mode", type=click.Choice(MODES), help="Default: static with data, else dynamic.")
@click.option("--calibrator", help="See `qcompile calibrators`.  [default: minmax]")
@click.option("--recipe", metavar="NAME|FILE",
              help=f"{', '.join(names())}, or a .yaml file; options override.")  # fmt: skip
@click.option("--pipeline", help='Passes: "name,name{option=value}"; see `qcompile passes`.')
@click.option("--keep-float", multiple=True,
              help="Pattern of node or tensor names to leave alone, or role:NAME.")  # fmt: skip
@click.option("--count-padding", is_flag=True, help="Calibrate on padding positions too.")
@click.option("--max-memory", type=Size(), default="1GiB", show_default=True,
              help="Bytes of activations that calibration may hold.")  # fmt: skip
@gate_options(latency=True)
@click.option("--report", "report_file", type=PATH, help="Default: <stem>.report.json beside OUT.")
@click.option("--seed", type=click.IntRange(0), help="Seed of made-up inputs.  [default: 0]")
@click.option("--threads", type=click.IntRange(0), default=0, help="0: one a core.")
@click.option("--no-verify", is_flag=True, help="Do not compare with the float model.")
@click.option("--no-bench", is_flag=True, help="Do not time against the float model.")
@click.option("--force", is_flag=True, help="Write even if a gate fails.")
@click.option("--dump-passes", type=PATH, help="Folder for a dump of the graph after each pass.")
@output_options
def compile(**given: Any) -> None:
    """Compile MODEL, an .onnx file, into a quantized one.

    The result is verified against MODEL and timed beside it; where it is worse or slower than the
    gates allow, nothing is written and the exit code is 1.
    """
    recipe, options, gates = recipe_from(given), options_from(given), gates_from(given)
    out: Path = given["output"]
    report_file = given["report_file"] or out.with_name(f"{out.stem}.report.json")
    if report_file.suffix != ".json":
        raise OutputError(f"report {str(report_file)!r}: expected a .json file")
    _check_distinct({"input model": given["model"], "output": out, "report": report_file})
    for path in (out, report_file):
        export.check_writable(path)
    if options.dump_dir is not None:
        _make_folder(options.dump_dir)
    try:
        with progress_bar(given["quiet"] or given["as_json"]) as bar:
            result = compile_job(given["model"], given["data"], recipe, gates, options, bar)
    except RejectedError as e:
        _result.show_or_print(console(), given, e.result)
        raise
    _result.deliver(console(), given, result, out, report_file)
    if not (given["quiet"] or given["as_json"]):
        click.echo(f"next:    qcompile inspect {shlex.quote(str(out))}")


def recipe_from(given: dict[str, Any]) -> Recipe:
    """The recipe, if any, with the command line's options on top."""
    recipe = Recipe() if given["recipe"] is None else read(given["recipe"])
    settings = {name: given[name] for name in _RECIPE_OPTIONS}
    settings["keep_float"] = given["keep_float"] or None
    settings["mask_padding"] = False if given["count_padding"] else None
    return merged(recipe, settings, "command line")


def options_from(given: dict[str, Any]) -> Options:
    """What is no part of the recipe."""
    return Options(
        tokenizer=given["tokenizer"],
        samples=given["samples"],
        batch_size=given["batch_size"],
        max_memory=given["max_memory"],
        threads=given["threads"],
        verify=not given["no_verify"],
        bench=not given["no_bench"],
        force=given["force"],
        dump_dir=given["dump_passes"],
    )


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
