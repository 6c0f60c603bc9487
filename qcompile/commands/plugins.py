"""qcompile passes, calibrators, targets: what is registered, each with its options and one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from qcompile.commands._console import console, print_json, table
from qcompile.compiler.stages.pipelines import default_pipeline
from qcompile.rewriting import Pass, registry


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def passes(as_json: bool, verbose: bool) -> None:
    """List passes by stage, with their options."""
    found = sorted(registry.passes().values(), key=lambda p: (p.stage, p.name))
    rows = [{**_row(p), "stage": p.stage.name.lower(), "numerics": p.numerics.value} for p in found]
    _show("passes", rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def calibrators(as_json: bool, verbose: bool) -> None:
    """List calibrators, with their options."""
    rows = [{**_row(c), "needs": c.needs} for c in registry.calibrators().values()]
    _show("calibrators", rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def targets(as_json: bool, verbose: bool) -> None:
    """List targets, with their modes and pipelines."""
    rows = [
        {
            "name": t.name,
            "what": t.summary,
            "modes": ", ".join(t.modes),
            "pipeline": default_pipeline(t, t.with_data),
        }
        for t in registry.targets().values()
    ]
    _show("targets", rows, as_json)


def _row(cls: type[Any]) -> dict[str, str]:
    options = ", ".join(f"{f.name.replace('_', '-')}={f.default}" for f in dataclasses.fields(cls))
    return {"name": cls.name, "what": _first_line(cls), "options": options}


def _first_line(cls: type[Pass] | type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _show(title: str, rows: list[dict[str, str]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    made = table(title, *rows[0])
    for column in made.columns:
        column.justify = "left"
    for row in rows:
        made.add_row(*row.values())
    console().print(made)
