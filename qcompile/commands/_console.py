"""What commands write: progress, tables, JSON, units."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from qcompile.commands._printable import printable
from qcompile.compiler.progress import Bars
from qcompile.system.json_values import json_value

_UNLIMITED = 1 << 16  # columns of lines that go to a file or a pipe


class LogLines:
    """Progress where stderr is no terminal, such as in CI: a line as each step begins."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def step(self, name: str, total: int | None = None) -> None:
        """Write the line, with the seconds since the command began."""
        length = "" if total is None else f" ({total})"
        seconds = time.monotonic() - self._begin
        click.echo(f"{seconds:8.1f} s  {printable(name)}{length}", err=True)

    def advance(self) -> None:
        """Nothing to write."""

    def finish(self) -> None:
        """Write a line for the end."""
        self.step("done")


Progressing: TypeAlias = Bars | LogLines


class _Counted(ProgressColumn):
    """Units done of all, and the time that the rest may take, where the length is known."""

    def render(self, task: Task) -> Text:
        if not task.fields["counted"]:
            return Text("")
        counts = f"{int(task.completed)}/{int(task.total or 0)}"
        left = task.time_remaining
        if task.finished or left is None:
            return Text(counts)
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{counts}  about {minutes}:{seconds:02} left")


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Progressing]:
    """Progress on stderr: bars on a terminal, of which finished ones stay visible, else lines."""
    console = Console(stderr=True)
    if shown and not console.is_terminal:
        lines = LogLines()
        yield lines
        lines.finish()
        return
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        _Counted(),
    )
    with Progress(*columns, console=console, disable=not shown) as inner:
        bar = Bars(inner)
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
    """A console on stdout; without a terminal no line is wrapped, so that names stay whole."""
    terminal = Output(highlight=False)
    return terminal if terminal.is_terminal else Output(highlight=False, width=_UNLIMITED)


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
