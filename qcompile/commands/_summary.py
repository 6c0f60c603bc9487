"""Shows a compilation: a table that compares float and compiled, notes, and the next command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from qcompile.commands._console import console, megabytes, print_json, safe, table
from qcompile.commands._options import OutputArguments
from qcompile.commands._report_files import ReportFiles
from qcompile.compiler.config import lockfile
from qcompile.compiler.report.report import Report
from qcompile.compiler.search import lowering_tuner
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.result import Result
from qcompile.runtime.evaluation.closeness import Closeness


def deliver(
    result: Result,
    out: Path,
    reports: ReportFiles,
    arguments: OutputArguments,
    lock_file: Path | None = None,
) -> None:
    """Show a result and write it. The model is written last: if it exists, all files do."""
    show_or_print(result, arguments)
    if lock_file is not None:
        result.save_lock(lock_file)
    reports.write(result.report)
    lowering_tuner.save_tuned(result.report, out)
    result.save(out)
    if arguments.for_people:
        files = "\n".join(f"report:  {p}" for p in reports.named.values())
        click.echo(f"written: {out}\n{files}")
        if result.report.tuning:
            tuned = lowering_tuner.tuned_file(out)
            click.echo(f"recipe:  {tuned}: --recipe builds the same without timing")
        if lock_file is not None:
            click.echo(f"lock:    {lock_file}{_calibration_file(lock_file, result)}")


def _calibration_file(lock_file: Path, result: Result) -> str:
    """The lock's second file and its size, which may be several times the model's."""
    if result.calibration is None:
        return ""
    path = lockfile.calibration_path(lock_file)
    return f", {path.name} ({megabytes(path.stat().st_size)})"


def show_or_print(result: Result, arguments: OutputArguments) -> None:
    """The table, or the whole report with --json, or nothing with -q."""
    if arguments.as_json:
        print_json(result.report)
    elif not arguments.quiet:
        show(result.report)


def show(report: Report) -> None:
    """Print the table and the notes of a report; first, on which processors outputs differ."""
    out = console()
    if report.saturation is not None and report.saturation.advice:
        out.print(f"[yellow]processors[/]: {safe(report.saturation.advice)}")
    rows = table(f"{report.source}: target {report.target}, {report.mode}", "", "float", "compiled")
    rows.add_row(
        "file size",
        megabytes(report.float_bytes),
        f"{megabytes(report.bytes)}  ({report.size_ratio:.1%})",
    )
    if report.speed is not None:
        old, new = report.speed.timings
        ratio = report.speed.ratio(1)
        shapes = ", ".join(f"{n} {s}" for n, s in list(report.speed.shapes.items())[:1])
        speedup = f"{new.best:.2f} ms  ({1 / ratio.best:.2f}x)"
        where = (
            f"{shapes}; {report.provider_missing}, not the target"
            if report.provider_missing
            else shapes
        )
        rows.add_row(f"latency, best ({where})", f"{old.best:.2f} ms", speedup)
        speedup = f"{new.median:.2f} ms  ({1 / ratio.median:.2f}x)"
        rows.add_row("latency, median", f"{old.median:.2f} ms", speedup)
    if report.forecast:
        rows.add_row("predicted speed-up", "", f"about {report.forecast.speedup:.1f}x")
    for name, output in _compared_outputs(report):
        rows.add_row(f"cosine of {name}, mean", "1", f"{output.mean_cosine:.4f}")
        rows.add_row(f"cosine of {name}, worst", "1", f"{output.worst_cosine:.4f}")
        if output.r2 is not None:
            where = "" if output.r2_columns is None else f", {output.r2_columns}"
            rows.add_row(f"R² of {name}{where}", "1", f"{output.r2:.4f}")
    if report.verdict is not None and report.verdict.metric is not None:
        rows.add_row("metric", *(f"{value:.4f}" for value in report.verdict.metric))
    if report.training is not None and (found := report.training.metric) is not None:
        rows.add_row(f"{found.name}, calibrated only", "", f"{found.calibrated:.2f}")
        trained = f"{found.compiled:.2f}  ({-found.drop:+.2f} points)"
        rows.add_row(f"{found.name}, trained", f"{found.float:.2f}", trained)
        if found.flips is not None:
            rows.add_row("another class than the float model's", "", f"{found.flips:.2%}")
    if report.verdict is not None:
        rows.add_row("samples compared", "", str(report.verdict.samples))
    if not report.provider_missing:  # another provider runs other operators
        convolutions = report.int8_convolutions
        linears = report.int8_linears - convolutions
        if linears or not convolutions:
            rows.add_row("int8 linear layers that ONNX Runtime runs", "0", str(linears))
        if convolutions:
            rows.add_row("int8 convolutions that ONNX Runtime runs", "0", str(convolutions))
    if report.int8_products:
        rows.add_row("int8 matrix multiplications in attention", "0", str(report.int8_products))
    cost = None if report.saturation is None else report.saturation.cost
    if cost is not None:
        label = f"rounding noise added by the bound on int8 sums ({cost.tensors} tensors)"
        rows.add_row(label, "", f"{cost.mean_db:+.1f} dB")
    out.print(rows)
    for failure in report.failures:
        out.print(f"[red]gate failed[/]: {safe(failure)}")
    for step in report.next_steps:
        out.print(f"[yellow]next step[/]: {safe(step)}")
    # Shown in a place of their own, above.
    elsewhere = {"saturation", *(("search-advice",) if report.next_steps else ())}
    for note in (n for n in report.notes if n.code not in elsewhere):
        out.print(f"[yellow]note[/]: {safe(note.text)}")
    unquantized = [r for r in report.ledger if r.kind == "weight" and r.dtype == "float"]
    if unquantized and report.mode != "float":
        size = sum(r.bytes for r in unquantized)
        out.print(f"{len(unquantized)} weights ({megabytes(size)}) stayed float:")
        for row in sorted(unquantized, key=lambda r: -r.bytes)[:5]:
            out.print(f"  {safe(row.tensor)} ({megabytes(row.bytes)}): {safe(row.reason)}")


def _compared_outputs(report: Report) -> Iterator[tuple[str, Closeness]]:
    """Outputs with their names, by both kinds of sums if x86 without VNNI computes others."""
    if report.verdict is None:
        return
    for label, verdict in saturation_check.shown(report.verdict).items():
        for number, output in enumerate(verdict.outputs, 1):
            name = _shown_name(output.name, number)
            yield f"{name}, {label}" if label else name, output


def _shown_name(name: str, number: int) -> str:
    """The name of an output; with its number where an exporter made the name up, as in 461."""
    made_up = name.isdigit() or "::" in name
    return f"output {number} ({name!r})" if made_up else repr(name)
