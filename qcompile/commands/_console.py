"""What commands write: progress, tables, JSON, units."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qcompile.commands._printable import printable
from qcompile.system.json_values import json_value

_LOG_WIDTH = 160


class Bar:
    """Progress on stderr with a bar where the length is known."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def step(self, name: str, total: int | None = None) -> None:
        """Finish the current step and begin another."""
        self.finish()
        self._task = self._progress.add_task(name, total=total)

    def advance(self) -> None:
        """One unit done."""
        self._progress.advance(self._task)

    def finish(self) -> None:
        """Fill the bar of the current step."""
        if self._task is not None:
            done = self._progress.tasks[self._task].completed
            self._progress.update(self._task, total=max(done, 1), completed=max(done, 1))


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Bar]:
    """Bars that appear on a terminal only, and stay there when done."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as inner:
        bar = Bar(inner)
        yield bar
        bar.finish()


def print_json(value: Any) -> None:
    """JSON on stdout, as in ``compiler/report/schemas/output.json``; what is not finite is null."""
    click.echo(json.dumps(json_value(value), indent=1, allow_nan=False))


class Output(Console):
    """A console that leaves a closed pipe to the caller; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """The reader has gone: pass it on."""
        raise BrokenPipeError


def console() -> Console:
    """Where tables go: stdout; wide where it is no terminal, so that logs keep whole names."""
    made = Output(highlight=False)
    return made if made.is_terminal else Output(highlight=False, width=_LOG_WIDTH)


def safe(text: str) -> str:
    """Text of a model as rich prints it literally: no markup in it, no terminal escapes."""
    return escape(printable(text))


class PlainTable(Table):
    """A table that takes its cells as they are: names of tensors hold brackets."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """One row, its strings made safe."""
        super().add_row(*(safe(c) if isinstance(c, str) else c for c in cells), **options)


def table(title: str, *columns: str) -> PlainTable:
    """A table whose first column is text and the others numbers."""
    made = PlainTable(title=safe(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return made


def megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
