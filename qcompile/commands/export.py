"""qcompile export SOURCE -o DIR"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import megabytes, print_json, progress_bar
from qcompile.commands._options import PATH, OutputArguments, output_options
from qcompile.compiler.model_folder import atomic_folder, hub, layout, tasks, torch_export
from qcompile.errors import ModelError


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@click.option("--task", type=click.Choice([t.name for t in tasks.TASKS]),
              help="What the model is for.  [default: from config.json]")  # fmt: skip
@click.option("--opset", type=click.IntRange(14, 20), default=torch_export.OPSET, show_default=True,
              help="ONNX opset of the file.")  # fmt: skip
@click.option("--drop-input", "dropped", multiple=True, metavar="NAME",
              help="Input to leave out of the file; the model's default value is used. "
                   "Repeatable.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit on the Hugging Face hub.")
@output_options
def export(
    source: str,
    output: Path,
    task: str | None,
    opset: int,
    dropped: tuple[str, ...],
    revision: str | None,
    **given: Any,
) -> None:
    """Export SOURCE, a transformers folder or a model's name on the Hugging Face hub, to ONNX.

    optimum exports the models that it supports, torch.onnx.export the others. The file is compared
    with the torch model on several shapes with padding; if it differs, nothing is written and the
    exit code is 1. Weights are read from .safetensors only. Needs pip install -e '.[export]' in a
    checkout.
    """
    arguments = OutputArguments(**given)
    chosen = None if task is None else tasks.task_named(task)
    with progress_bar(shown=not arguments.quiet) as bar:
        if Path(source).is_dir():
            folder = layout.read_folder(Path(source))
        else:
            bar.step("fetch")
            folder = hub.fetch_folder(source, revision)
        if not folder.weights and folder.models:
            command = f"qcompile compile {shlex.quote(source)} -o OUT"
            raise ModelError(f"{source!r} holds ONNX files already: {command}")
        with atomic_folder.folder_to_fill(output, folder.path) as stage:
            atomic_folder.copy_companions(folder, stage)
            bar.step("export")
            exported = torch_export.export_folder(folder, stage, chosen, opset, dropped=dropped)
            account = torch_export.ExportAccount(Path(source).name, folder, exported)
            atomic_folder.write_manifest(stage, account.to_dict())
    if arguments.as_json:
        print_json(account)
    elif not arguments.quiet:
        size = sum((output / file).stat().st_size for file in exported.files)
        click.echo(f"exported: {exported}")
        for note in exported.notes:
            click.echo(f"note:    {note}")
        click.echo(f"written: {output}: {', '.join(exported.files)} ({megabytes(size)})")
        next_out = shlex.quote(f"{output}-int8")
        click.echo(f"next:    qcompile compile {shlex.quote(str(output))} -o {next_out} --data …")
