"""qcompile sensitivity MODEL --data DATA [-o policy.yaml]"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import PlainTable, console, print_json, progress_bar, table
from qcompile.commands._help import GroupedCommand
from qcompile.commands._options import (
    MODEL,
    PATH,
    GateArguments,
    OutputArguments,
    Widths,
    data_options,
    gate_options,
    output_options,
)
from qcompile.commands._recipe_options import RecipeArguments, recipe_options
from qcompile.commands._report_files import by_suffix
from qcompile.compiler.python_api import sensitivity as measure
from qcompile.compiler.report import html
from qcompile.compiler.report.records import WeightDrops
from qcompile.compiler.search.policy import Policy, Ranking, Sensitivity
from qcompile.compiler.search.precision_candidates import BY, By
from qcompile.compiler.search.sensitivity import MEASURES, Measure, Score, SensitivityRow
from qcompile.errors import OutputError
from qcompile.system import atomic_write

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class SensitivityArguments(RecipeArguments, GateArguments, OutputArguments):
    """One field per option."""

    model: Path
    output: Path | None
    data: str
    report_files: tuple[Path, ...]
    by: By
    what: Measure
    bits: tuple[int, ...]
    top: int
    lift: int | None


@click.command(cls=GroupedCommand)
@click.argument("model", type=MODEL)
@click.option("--data", required=True,
              help="Calibration data; a part is held out to measure on.")  # fmt: skip
@data_options
@click.option("-o", "--output", type=PATH, help="Policy to write (.yaml), a recipe for `compile`.")
@click.option("--report", "report_files", type=PATH, multiple=True,
              help="x.html: write a page. x.json: write what --json prints.")  # fmt: skip
@click.option("--by", type=click.Choice(BY), default="tensor", show_default=True,
              help="How tensors are grouped into items.")  # fmt: skip
@click.option("--measure", "what", type=click.Choice(MEASURES), default="both", show_default=True,
              help="alone: quantize only this item. lifted: quantize all others.")  # fmt: skip
@click.option("--bits", type=Widths(), default=(), help="Also measure each weight alone at these "
              "widths, 2 to 7 bits, as in 4,3,2.")  # fmt: skip
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Rows to show.")
@click.option("--lift", type=click.IntRange(0),
              help="Number of items whose precision the policy raises.  [default: what the gates "
                   "need]")  # fmt: skip
@recipe_options
@gate_options(compiling=False)
@output_options
def sensitivity(**given: Any) -> None:
    """Rank the tensors of MODEL by the output error that quantizing them causes.

    Errors are 1 - cosine, or half of 1 - R² if that is more, averaged over outputs. -o writes a
    recipe that raises the most sensitive items to 16 bits, or to float where the target has no
    16 bits.
    """
    arguments = SensitivityArguments(**given)
    out = arguments.output
    reports = by_suffix(arguments.report_files)
    if out is not None:
        _check(out, arguments.model)
    for path in reports.values():
        atomic_write.check_writable(path)
    options, recipe = arguments.make_options(), arguments.make_recipe()
    with progress_bar(shown=not arguments.quiet) as bar:
        found = measure(
            arguments.model,
            arguments.data,
            by=arguments.by,
            measure=arguments.what,
            bits=arguments.bits,
            recipe=recipe,
            gates=arguments.make_gates(recipe),
            options=options,
            progress=bar,
        )
    policy = None if out is None else found.policy(arguments.lift)
    ranking = Ranking(found, policy).to_dict()
    for suffix, path in reports.items():
        text = html.page(ranking) if suffix == ".html" else json.dumps(ranking, indent=1) + "\n"
        atomic_write.write_atomic(path, text.encode())
    if arguments.as_json:
        print_json(ranking)
    elif not arguments.quiet:
        show(found, arguments.top)
    if out is not None and policy is not None:
        heading = f"qcompile sensitivity {found.source} --by {found.by}"
        atomic_write.write_atomic(out, policy.to_yaml(heading).encode())
        if arguments.for_people:
            _announce(out, arguments.model, policy)
    if arguments.for_people:
        for path in reports.values():
            click.echo(f"report:  {path}")
    if options.cache is not None:
        options.cache.forget()


def _check(out: Path, model: Path) -> None:
    if out.suffix not in _SUFFIXES:
        raise OutputError(f"policy {str(out)!r}: expected a .yaml file")
    if out.resolve() == model.resolve():
        raise OutputError(f"output {str(out)!r} is the input model itself")
    atomic_write.check_writable(out)


def show(found: Sensitivity, top: int) -> None:
    """Print the table: the error of each item alone, and the error left if it is raised."""
    prepared = found.found.prepared
    made = table(
        f"{found.source}: target {prepared.target.name}, {prepared.mode}, error with all "
        f"quantized {found.quantized.error:.2e}",
        "item",
        "rank",
        "role",
        "layer",
        "kind",
        "alone: error",
        "SQNR dB",
        "raised: error left",
    )
    for rank, row in enumerate(found.rows[:top], 1):
        made.add_row(row.item.name, str(rank), *_cells(row))
    console().print(made)
    if found.widths:
        console().print(_weights(found.widths[:top]))
    for note in found.notes:
        click.echo(f"note: {note.text}")
    if len(found.rows) > top:
        click.echo(f"{len(found.rows) - top} more: --top shows them")


def _weights(rows: Sequence[WeightDrops]) -> PlainTable:
    """The error of each weight alone at each width, with the worst cosine."""
    widths = sorted({drop.bits for row in rows for drop in row.measured}, reverse=True)
    heads = [f"{bits} bits: error, worst cosine" for bits in widths]
    made = table("weights alone, by bits", "weight", "role", "layer", *heads)
    for row in rows:
        drops = {d.bits: f"{d.error:.2e}, {d.worst_cosine:.4f}" for d in row.measured}
        layer = "-" if row.layer is None else str(row.layer)
        made.add_row(row.item, row.role, layer, *(drops.get(bits, "-") for bits in widths))
    return made


def _cells(row: SensitivityRow) -> list[str]:
    sqnr = "-" if row.alone is None else f"{row.alone.sqnr_db:.1f}"
    layer = "-" if row.item.layer is None else str(row.item.layer)
    return [row.item.roles, layer, row.item.kinds, _error(row.alone), sqnr, _error(row.raised)]


def _error(score: Score | None) -> str:
    return "-" if score is None else f"{score.error:.2e}"


def _announce(out: Path, model: Path, policy: Policy) -> None:
    score = policy.predicted
    click.echo(
        f"written: {out}, which raises {len(policy.raised)}: predicted cosine "
        f"{score.mean_cosine:.4f}, worst {score.worst_cosine:.4f}"
    )
    click.echo(
        f"next:    qcompile compile {shlex.quote(str(model))} --recipe {shlex.quote(str(out))} …"
    )
