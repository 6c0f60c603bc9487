"""qcompile export SOURCE -o DIR"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import megabytes, print_json, progress_bar
from qcompile.commands._options import PATH, output_options
from qcompile.compiler.model_folder import atomic_folder, hub, layout, tasks, torch_export
from qcompile.errors import ModelError


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@click.option("--task", type=click.Choice([t.name for t in tasks.TASKS]),
              help="What the model is for.  [default: as config.json says]")  # fmt: skip
@click.option("--opset", type=click.IntRange(14, 20), default=torch_export.OPSET, show_default=True,
              help="Version of ONNX's operators.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit on the hub.")
@output_options
def export(**given: Any) -> None:
    """Export SOURCE, a transformers folder or a model's name on the Hugging Face hub, to ONNX.

    optimum exports where it can, torch.onnx.export else. The file is compared with the torch model
    on several shapes with padding; where it differs, nothing is written and the exit code is 1.
    Weights are read from .safetensors only. Needs: pip install -e '.[export]' in a checkout.
    """
    out, name = given["output"], given["source"]
    task = None if given["task"] is None else tasks.named(given["task"])
    with progress_bar(given["quiet"] or given["as_json"]) as bar:
        if Path(name).is_dir():
            folder = layout.read_folder(Path(name))
        else:
            bar.step("fetch")
            folder = hub.fetch(name, given["revision"])
        if not folder.weights and folder.models:
            raise ModelError(
                f"{name!r} holds ONNX files already: qcompile compile {shlex.quote(name)} -o OUT"
            )
        with atomic_folder.written(out, folder.path) as stage:
            atomic_folder.copy_companions(folder, stage)
            bar.step("export")
            made = torch_export.export(folder, stage, task, given["opset"])
            account = torch_export.ExportAccount(Path(name).name, folder, made)
            atomic_folder.write_manifest(stage, account.to_dict())
    if given["as_json"]:
        print_json(account)
    elif not given["quiet"]:
        size = sum((out / file).stat().st_size for file in made.files)
        click.echo(f"exported: {made}")
        for note in made.notes:
            click.echo(f"note:    {note}")
        click.echo(f"written: {out}: {', '.join(made.files)} ({megabytes(size)})")
        next_out = shlex.quote(f"{out}-int8")
        click.echo(f"next:    qcompile compile {shlex.quote(str(out))} -o {next_out} --data …")
