"""qcompile passes, calibrators, targets: lists what is registered, with options and a summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from qcompile.commands._console import console, print_json, table
from qcompile.compiler.stages.pipelines import default_pipeline
from qcompile.rewriting import Pass, registry


@dataclass(frozen=True)
class PassRow:
    """One pass."""

    name: str
    what: str
    options: str
    stage: str
    numerics: str


@dataclass(frozen=True)
class CalibratorRow:
    """One calibrator."""

    name: str
    what: str
    options: str
    needs: str


@dataclass(frozen=True)
class TargetRow:
    """One target."""

    name: str
    what: str
    modes: str
    pipeline: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def passes(as_json: bool, verbose: bool) -> None:
    """List passes by stage, with their options."""
    found = sorted(registry.passes().values(), key=lambda p: (p.stage, p.name))
    rows = [PassRow(*_common(p), p.stage.name.lower(), p.numerics.value) for p in found]
    _show("passes", rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def calibrators(as_json: bool, verbose: bool) -> None:
    """List calibrators, with their options."""
    rows = [CalibratorRow(*_common(c), c.needs) for c in registry.calibrators().values()]
    _show("calibrators", rows, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def targets(as_json: bool, verbose: bool) -> None:
    """List targets, with their modes and pipelines."""
    rows = [
        TargetRow(t.name, t.summary, ", ".join(t.modes), default_pipeline(t, t.with_data))
        for t in registry.targets().values()
    ]
    _show("targets", rows, as_json)


def _common(cls: type[Any]) -> tuple[str, str, str]:
    """Name, summary and options."""
    options = ", ".join(f"{f.name.replace('_', '-')}={f.default}" for f in dataclasses.fields(cls))
    return cls.name, _first_line(cls), options


def _first_line(cls: type[Pass] | type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _show(title: str, rows: Sequence[PassRow | CalibratorRow | TargetRow], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    made = table(title, *vars(rows[0]))
    for column in made.columns:
        column.justify = "left"
    for row in rows:
        made.add_row(*vars(row).values())
    console().print(made)
