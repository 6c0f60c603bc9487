"""qcompile inspect MODEL"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import onnx

from qcompile.commands._console import console, megabytes, print_json, table
from qcompile.commands._options import PATH, OutputArguments, custom_ops_option, output_options
from qcompile.compiler.report import ledger, sidecar_files
from qcompile.compiler.report.ledger import LedgerRow
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
@click.argument("model", type=PATH)
@click.option("--all", "every", is_flag=True, help="Show one row for each tensor, not only sums.")
@click.option("--report", "report_file", type=PATH,
              help="Report of MODEL.  [default: <stem>.report.json next to it]")  # fmt: skip
@custom_ops_option
@output_options
def inspect(model: Path, every: bool, report_file: Path | None, **given: Any) -> None:
    """Show which tensors of MODEL are int8 and which are float, why, and how many bytes they take.

    Sizes sum to the file size. Reasons come from the report that compile wrote next to the model.
    """
    arguments = OutputArguments(**given)
    # Raises errors for an invalid model before the runtime loads it.
    shape_inference.infer(read_model.load(model))
    proto, _storage = read_model.read_model(model)
    report_file = report_file or sidecar_files.report_path(model)
    report = sidecar_files.find_report(report_file, digests.file_digest(model))
    reported = sidecar_files.rows_of(report)
    size = model.stat().st_size + external_data.external_bytes(proto)
    rows = reported if reported is not None else ledger.ledger_rows(proto, size)
    operators = dict(sorted(_operators(model, proto).items()))
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


def _operators(model: Path, proto: onnx.ModelProto) -> Counter[str]:
    """Operators that ONNX Runtime runs; those of the file without a custom operator's library."""
    try:
        return session.optimized_ops(model)
    except session.UnknownOperatorError:
        return session.written_ops(proto)


def _show_summary(path: Path, rows: list[LedgerRow], size: int) -> None:
    made = table(f"{path.name}: {megabytes(size)}", "what", "type", "tensors", "bytes", "share")
    for s in ledger.summarize_rows(rows):
        share = f"{s.bytes / size:.1%}" if s.bytes else "-"
        made.add_row(s.kind, s.dtype, str(s.count), f"{s.bytes:,}", share)
    made.add_section()
    made.add_row("file", "", "", f"{sum(r.bytes for r in rows):,}", "100.0%")
    console().print(made)


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
    made = table(
        "tensors", "tensor", "what", "type", "shape", "bytes", "SQNR dB", "range", "reason"
    )
    for r in rows:
        noise = "" if r.sqnr_db is None else f"{r.sqnr_db:.1f}"
        span = "" if r.low is None or r.high is None else f"{r.low:.3g} … {r.high:.3g}"
        shape = "x".join(str(d) for d in r.shape)
        made.add_row(r.name, r.kind, r.dtype, shape, f"{r.bytes:,}", noise, span, r.reason)
    console().print(made)
