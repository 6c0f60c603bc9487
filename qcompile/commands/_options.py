"""Options and output that several commands share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qcompile.commands._printable import printable
from qcompile.evaluation.closeness import Gates
from qcompile.system.json_values import finite

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
_LOG_WIDTH = 160
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Size(click.ParamType[int]):
    """Bytes, written as 800MB, 2GiB or a plain number."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Bytes as an int."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?)B?", str(value).strip().upper())
        try:
            return int(float(match[1]) * _UNITS[match[2]]) if match else 1 // 0
        except (KeyError, ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is no size, expected for example 800MB or 2GiB", param, ctx)


class Ranged(click.ParamType[tuple[str, tuple[int, ...]]]):
    """``name=1`` or ``name=1,2,3``: a name and whole numbers, at most ``most``."""

    name = "NAME=N[,N...]"

    def __init__(self, separator: str = ",", most: int | None = None) -> None:
        self.separator, self.most = separator, most
        self.name = "NAME=N" if most == 1 else f"NAME=N[{separator}N...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[int, ...]]:
        """(name, numbers)."""
        if isinstance(value, tuple):
            return value
        name, equals, numbers = str(value).partition("=")
        try:
            sizes = tuple(int(n) for n in numbers.split(self.separator))
        except ValueError:
            sizes = ()
        many = self.most is not None and len(sizes) > self.most
        if not (name and equals and sizes) or min(sizes) < 1 or many:
            self.fail(f"{value!r} is not {self.name} with numbers of 1 and more", param, ctx)
        return name, sizes


def output_options(command: F) -> F:
    """-q, -v and --json."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")(
        command
    )
    command = click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and details.")(
        command
    )
    return click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)


def data_options(command: F) -> F:
    """How --data is read."""
    command = click.option(
        "--batch-size", type=click.IntRange(1), help="Samples in a batch, for text and .npz: 8."
    )(command)
    command = click.option(
        "--samples", type=click.IntRange(1), help="Stop after so many samples; text: 256."
    )(command)
    return click.option(
        "--tokenizer", type=PATH, help="Folder with tokenizer.json, for text data."
    )(command)


_GATES = {
    "min_cosine": "Smallest mean cosine of an output to the float model's.",
    "min_worst_cosine": "Smallest cosine of any single sample.",
    "min_sqnr": "Smallest signal to quantization noise ratio, in dB.",
    "max_flips": "Largest share of changed argmax decisions.",
    "max_abs": "Largest absolute difference of any value.",
    "max_latency_ratio": "Largest time of compiled over float.",
    "min_metric": "Smallest value of --metric.",
}
_COMPILING_GATES = ("max_latency_ratio", "min_metric")
ACCURACY_GATES = tuple(name for name in _GATES if name != "max_latency_ratio")


def gate_options(*, compiling: bool) -> Callable[[F], F]:
    """One option a gate, with its default; some only make sense while compiling."""

    def decorate(command: F) -> F:
        defaults = Gates()
        for field in reversed(fields(Gates)):
            if field.name in _COMPILING_GATES and not compiling:
                continue
            default = getattr(defaults, field.name)
            text = _GATES[field.name] + ("" if default is not None else "  [default: off]")
            flag = "--" + field.name.replace("_", "-")
            option = click.option(
                flag, type=float, default=default, show_default=default is not None, help=text
            )
            command = option(command)
        return command

    return decorate


def gates_from(values: Mapping[str, Any]) -> Gates:
    """Gates out of a command's parameters."""
    names = {f.name for f in fields(Gates)}
    return Gates(**{k: v for k, v in values.items() if k in names})


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
def progress_bar(hidden: bool) -> Iterator[Bar]:
    """Bars that appear on a terminal only, and stay there when done."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
    )
    shown = not hidden and console.is_terminal
    with Progress(*columns, console=console, disable=not shown) as inner:
        bar = Bar(inner)
        yield bar
        bar.finish()


def print_json(value: Any) -> None:
    """JSON on stdout; what is not finite is null. Its schema: ``report/schemas/output.json``."""
    click.echo(json.dumps(finite(value), indent=1, allow_nan=False))


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
