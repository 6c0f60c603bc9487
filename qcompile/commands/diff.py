"""qcompile diff A B"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import console, megabytes, print_json, table
from qcompile.commands._options import MODEL, OutputArguments, output_options
from qcompile.compiler.report.model_diff import Difference, Entry, TensorChange, diff_models
from qcompile.compiler.report.scales_in_file import Scales

_WIDEST = 60


@click.command()
@click.argument("a", type=MODEL)
@click.argument("b", type=MODEL)
@click.option("--top", type=click.IntRange(1), default=20, show_default=True,
              help="Tensors to show for each kind of change.")  # fmt: skip
@output_options
def diff(a: Path, b: Path, top: int, **given: Any) -> None:
    """Show what differs between two models: settings, operators, types, scales, sizes.

    Any two .onnx files can be compared. Settings and reasons are read from the report or lock next
    to a model, if compile wrote one. The exit code is 0 whether they differ or not.
    """
    arguments = OutputArguments(**given)
    difference = diff_models(a, b)
    if arguments.as_json:
        print_json(difference)
    elif not arguments.quiet:
        show(difference, top)


def show(difference: Difference, top: int) -> None:
    """Print one line if the models are equal, else a table for each kind of difference."""
    old, new = difference.a, difference.b
    if difference.equal:
        click.echo(f"the same bytes: {megabytes(old.bytes)}, sha256 {old.sha256[:12]}")
        return
    for name, one in (("a", old), ("b", new)):
        click.echo(f"{name}: {one.path}, {one.bytes:,} bytes ({megabytes(one.bytes)})")
    _show_pairs("settings", difference.settings)
    _show_pairs("operators", difference.operators)
    for change in dict.fromkeys(t.change for t in difference.tensors):
        _show_tensors(change, [t for t in difference.tensors if t.change == change], top)
    if not (difference.settings or difference.operators or difference.tensors):
        click.echo("operators, types, scales and weights are the same: names or the like differ")


def _show_pairs(title: str, pairs: dict[str, Any]) -> None:
    if not pairs:
        return
    made = table(title, "", "a", "b")
    for name, (old, new) in pairs.items():
        made.add_row(name, *_around_difference(_cell(old), _cell(new)))
    console().print(made)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def _around_difference(a: str, b: str) -> tuple[str, str]:
    """Long texts, such as pipelines, truncated around the first difference."""
    if max(len(a), len(b)) <= _WIDEST:
        return a, b
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    start = max(0, same - _WIDEST // 3)
    return _truncated(a, start), _truncated(b, start)


def _truncated(text: str, start: int) -> str:
    shown = text[start : start + _WIDEST]
    return f"{'…' if start else ''}{shown}{'…' if start + _WIDEST < len(text) else ''}"


def _show_tensors(change: str, rows: list[TensorChange], top: int) -> None:
    made = table(
        f"tensors: {change} ({len(rows)})", "tensor", "what", "a", "b", "values that differ"
    )
    for row in sorted(rows, key=_weight)[:top]:
        share = "" if row.share is None else f"{row.share:.2%}, by {row.largest:.3g} at most"
        made.add_row(row.tensor, row.kind, _side(row.a, change), _side(row.b, change), share)
    console().print(made)
    if len(rows) > top:
        click.echo(f"{len(rows) - top} more: --top shows them")


def _weight(row: TensorChange) -> tuple[float, str]:
    """Sort key: the largest tensor first."""
    sizes = [s.bytes for s in (row.a, row.b) if s is not None]
    return -max(sizes), row.tensor


def _side(entry: Entry | None, change: str) -> str:
    if entry is None:
        return "-"
    if change == "scale":
        return _scale(entry)
    if change == "shape":
        return "x".join(map(str, entry.shape))
    if change == "computed":
        computed = f"computed in {entry.computed}, " if entry.computed else ""
        return f"{entry.type}, {computed}{entry.memory_dtype or 'nothing'} in memory"
    size = f", {entry.bytes:,} bytes" if entry.bytes else ""
    return f"{entry.type}{size}"


def _scale(entry: Entry) -> str:
    scale = entry.scale
    if isinstance(scale, Scales):
        return f"{scale.scales} of {scale.lowest:.4g} to {scale.highest:.4g}"
    return "-" if scale is None else f"{scale:.6g}, zero {entry.zero_point}"
