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
    """Progress bars, shown only on a terminal; finished ones stay visible."""
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
    """JSON on stdout, as in ``compiler/report/schemas/output.json``; infinities are null."""
    click.echo(json.dumps(json_value(value), indent=1, allow_nan=False))


class Output(Console):
    """A console that lets the caller handle a closed pipe; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """The reader closed the pipe: raise it to the caller."""
        raise BrokenPipeError


def console() -> Console:
    """A console on stdout; wide if it is not a terminal, so that logs show whole names."""
    terminal = Output(highlight=False)
    return terminal if terminal.is_terminal else Output(highlight=False, width=_LOG_WIDTH)


def safe(text: str) -> str:
    """Text of a model, escaped so that rich prints it literally, without terminal escapes."""
    return escape(printable(text))


class PlainTable(Table):
    """A table that prints its cells literally: names of tensors may hold brackets."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """One row, its strings made safe."""
        super().add_row(*(safe(c) if isinstance(c, str) else c for c in cells), **options)


def table(title: str, *columns: str) -> PlainTable:
    """A table whose first column is text and the others are numbers."""
    empty = PlainTable(title=safe(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        empty.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return empty


def megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
