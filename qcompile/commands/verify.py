"""qcompile verify REFERENCE CANDIDATE --data DATA"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import console, print_json, safe, table
from qcompile.commands._help import GroupedCommand
from qcompile.commands._options import (
    MODEL,
    DataArguments,
    GateArguments,
    OutputArguments,
    custom_ops_option,
    data_options,
    gate_options,
    output_options,
)
from qcompile.commands._recipe_options import isa_option, pooling_options
from qcompile.compiler.python_api import verify as compare_models
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.models import BFLOAT16_NOTE, needs_float32
from qcompile.errors import GateError
from qcompile.ir.pooling import KINDS, PoolingKind
from qcompile.runtime.evaluation.batch_invariance import Invariance
from qcompile.runtime.evaluation.closeness import FIGURES, Verdict


@dataclass(frozen=True, kw_only=True)
class VerifyArguments(DataArguments, GateArguments, OutputArguments):
    """One field per option."""

    reference: Path
    candidate: Path
    data: str
    isa: str | None
    pooling: PoolingKind | None
    normalize: bool
    metric: str | None


@click.command(cls=GroupedCommand)
@click.argument("reference", type=MODEL)
@click.argument("candidate", type=MODEL)
@click.option("--data", required=True, help="Data to compare on, as for compile.")
@data_options
@custom_ops_option
@isa_option
@pooling_options(
    "Compare embeddings: models that do not return sentence_embedding are pooled.", KINDS
)
@gate_options(compiling=False, measuring=True)
@click.option("--metric", metavar="NAME", help="Also measure both models: labels is the metric of "
              "the task on all labels of --data, or those of the first --samples; else "
              "module:function.")  # fmt: skip
@output_options
def verify(**given: Any) -> None:
    """Compare the outputs of CANDIDATE with those of REFERENCE; exit 1 if a gate fails."""
    arguments = VerifyArguments(**given)
    verdict = compare_models(
        arguments.reference,
        arguments.candidate,
        arguments.data,
        gates=arguments.make_gates(),
        tokenizer=arguments.tokenizer,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        text_columns=arguments.text_columns,
        isa=arguments.isa or "",
        pooling=arguments.pooling,
        normalize=arguments.normalize,
        metric=arguments.metric,
    )
    if arguments.as_json:
        print_json(verdict)
    elif not arguments.quiet:
        show(verdict)
        for model in filter(needs_float32, (arguments.reference, arguments.candidate)):
            click.echo(f"note: {model.name} {BFLOAT16_NOTE}")
    if not verdict.passed:
        raise GateError("; ".join(verdict.failures))


def show(verdict: Verdict) -> None:
    """Print on which processors outputs differ, one row per output and kind of sums, then notes."""
    if difference := saturation_check.difference(verdict):
        console().print(f"[yellow]processors[/]: {safe(difference)}")
    made = table(f"{verdict.samples} samples", "output", *FIGURES)
    for label, one in saturation_check.shown(verdict).items():
        for o in one.outputs:
            made.add_row(f"{o.name}, {label}" if label else o.name, *o.figures())
    console().print(made)
    if (metric := verdict.metric) is not None:
        click.echo(f"metric:  reference {metric.reference:.4f}, candidate {metric.compiled:.4f}")
    note = Invariance(verdict.alone, verdict.padded).note
    if note is not None:
        click.echo(f"note: {note}")
    if verdict.selection is not None:
        click.echo(f"note: {verdict.selection}")
    for line in (
        *saturation_check.same_notes(verdict),
        *saturation_check.unemulated_notes(verdict),
        *saturation_check.session_notes(verdict),
    ):
        click.echo(f"note: {line}")
