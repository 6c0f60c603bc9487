"""qcompile verify REFERENCE CANDIDATE --data DATA"""

from __future__ import annotations

from typing import Any

import click

from qcompile.commands._shared import (
    PATH,
    console,
    data_options,
    gate_options,
    gates_from,
    output_options,
    print_json,
    table,
)
from qcompile.compare import Verdict
from qcompile.errors import GateError
from qcompile.invariance import Invariance
from qcompile.python import verify as compare_models


@click.command()
@click.argument("reference", type=PATH)
@click.argument("candidate", type=PATH)
@click.option("--data", required=True, help="Feeds to compare on, in any form.")
@data_options
@gate_options(compiling=False)
@output_options
def verify(**given: Any) -> None:
    """Compare the outputs of CANDIDATE with REFERENCE's; exit 1 where a gate fails."""
    verdict = compare_models(
        given["reference"],
        given["candidate"],
        given["data"],
        gates=gates_from(given),
        tokenizer=given["tokenizer"],
        samples=given["samples"],
        batch_size=given["batch_size"],
    )
    if given["as_json"]:
        print_json(verdict.to_dict())
    elif not given["quiet"]:
        show(verdict)
    if not verdict.passed:
        raise GateError("; ".join(verdict.failures))


def show(verdict: Verdict) -> None:
    """One row an output."""
    made = table(
        f"{verdict.samples} samples",
        "output",
        "cosine mean",
        "worst",
        "SQNR dB",
        "max abs",
        "flips",
    )
    for o in verdict.outputs:
        flips = f"{o.flip_share:.2%}" if o.decisions else "-"
        made.add_row(
            o.name,
            f"{o.mean_cosine:.5f}",
            f"{o.worst_cosine:.5f}",
            f"{o.sqnr_db:.1f}",
            f"{o.max_abs:.3g}",
            flips,
        )
    console().print(made)
    note = Invariance(verdict.alone, verdict.padded).note
    if note is not None:
        click.echo(f"note: {note}")
