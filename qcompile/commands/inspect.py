"""qcompile inspect MODEL"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import onnx

from qcompile.commands._console import console, megabytes, print_json, table
from qcompile.commands._options import (
    MODEL,
    PATH,
    OutputArguments,
    custom_ops_option,
    output_options,
)
from qcompile.compiler.report import ledger, sidecar_files
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.stages.models import needs_float32
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import external_data, read_model
from qcompile.runtime import session
from qcompile.system import digests


@dataclass(frozen=True)
class Inspection:
    """The output of ``inspect``."""

    bytes: int
    ledger: list[LedgerRow]
    operators: Annotated[dict[str, int], "as ONNX Runtime runs them"]


@click.command()
@click.argument("model", type=MODEL)
@click.option("--all", "every", is_flag=True, help="Show one row for each tensor, not only sums.")
@click.option("--report", "report_file", type=PATH,
              help="Report of MODEL.  [default: <stem>.report.json next to it]")  # fmt: skip
@custom_ops_option
@output_options
def inspect(model: Path, every: bool, report_file: Path | None, **given: Any) -> None:
    """Show which tensors of MODEL are int8 and which are float, why, and how many bytes they take.

    Sizes sum to the file size. Reasons come from the report that compile wrote next to the model.
    Where weights are computed with, or held in memory, in another type than that of the file, it is
    shown too.
    """
    arguments = OutputArguments(**given)
    # Raises errors for an invalid model before the runtime loads it.
    shape_inference.infer(read_model.load(model))
    proto, _storage = read_model.read_model(model)
    report_file = report_file or sidecar_files.report_path(model)
    report = sidecar_files.find_report(report_file, digests.file_digest(model))
    reported = sidecar_files.rows_of(report)
    size = model.stat().st_size + external_data.external_bytes(proto)
    run_graph = _run_graph(model)
    rows = reported if reported is not None else ledger.ledger_rows(proto, size)
    on_cpu = ledger.provider_of(proto) == session.CPU
    rows = ledger.with_uses(rows, proto, run_graph if on_cpu else None)
    operators = dict(sorted(session.count_ops(run_graph or proto.graph).items()))
    if arguments.as_json:
        print_json(Inspection(size, rows, operators))
        return
    if arguments.quiet:
        return
    _show_summary(model, rows, size)
    if every:
        _show_rows(rows)
    else:
        _show_float(rows)
    if reported is None:
        click.echo("no report of this file next to it: reasons are derived from the file alone")
    if not every:
        click.echo(f"next:    qcompile inspect {model} --all")


def _run_graph(model: Path) -> onnx.GraphProto | None:
    """What ONNX Runtime runs; None where the library of a custom operator is missing, or the model
    computes in bfloat16, which the CPU provider does not."""
    if needs_float32(model):
        return None
    try:
        return session.optimized_graph(model)
    except session.UnknownOperatorError:
        return None


def _show_summary(path: Path, rows: list[LedgerRow], size: int) -> None:
    """Bytes by kind and type, and what they become in a run, if that differs for a weight."""
    heads = ("what", "type", "tensors", "bytes", "share")
    uses = any(row.differs for row in rows)
    more = ("computed in", "in memory", "bytes in memory") if uses else ()
    made = table(f"{path.name}: {megabytes(size)}", *heads, *more)
    for s in ledger.summarize_rows(rows):
        share = f"{s.bytes / size:.1%}" if s.bytes else "-"
        group = [row for row in rows if (row.kind, row.dtype) == (s.kind, s.dtype)]
        shown = _uses(group) if uses else ()
        made.add_row(s.kind, s.dtype, str(s.count), f"{s.bytes:,}", share, *shown)
    made.add_section()
    total = ("", "", _memory(rows)) if uses else ()
    made.add_row("file", "", "", f"{sum(r.bytes for r in rows):,}", "100.0%", *total)
    console().print(made)


def _uses(rows: Sequence[LedgerRow]) -> tuple[str, str, str]:
    """Types in which rows are computed with, and their types and bytes in memory."""
    types = (
        sorted({name for text in texts for name in text.split(", ") if name})
        for texts in ((r.computed for r in rows), (r.memory_dtype for r in rows))
    )
    computed, memory = map(", ".join, types)
    return computed, memory, _memory(rows)


def _memory(rows: Sequence[LedgerRow]) -> str:
    known = [row.memory for row in rows if row.memory is not None]
    return f"{sum(known):,}" if known else ""


def _show_float(rows: list[LedgerRow]) -> None:
    """Float weights and activations by reason."""
    reasons: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        if row.kind in ("weight", "activation") and row.dtype.startswith("float"):
            count, size = reasons.get((row.kind, row.reason), (0, 0))
            reasons[row.kind, row.reason] = (count + 1, size + row.bytes)
    if not reasons:
        return
    made = table("float, and why", "reason", "what", "tensors", "bytes")
    for (kind, reason), (count, size) in sorted(reasons.items(), key=lambda i: -i[1][1]):
        made.add_row(reason, kind, str(count), f"{size:,}")
    console().print(made)


def _show_rows(rows: list[LedgerRow]) -> None:
    uses = any(row.differs for row in rows)
    more = ("computed in", "in memory", "bytes in memory") if uses else ()
    heads = ("tensor", "what", "type", "shape", "bytes", *more, "SQNR dB", "range", "reason")
    made = table("tensors", *heads)
    for r in rows:
        noise = "" if r.sqnr_db is None else f"{r.sqnr_db:.1f}"
        span = "" if r.low is None or r.high is None else f"{r.low:.3g} … {r.high:.3g}"
        shape = "x".join(str(d) for d in r.shape)
        shown = _uses([r]) if uses else ()
        size = f"{r.bytes:,}"
        made.add_row(r.name, r.kind, r.dtype, shape, size, *shown, noise, span, r.reason)
    console().print(made)
