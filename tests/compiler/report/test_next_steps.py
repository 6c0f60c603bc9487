"""What a report advises after a failed gate: at most three lines, only from what it knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qcompile
from qcompile.calibration.calibration_file import CalibrationAccount
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.next_steps import MOST, accepting_limits, next_steps
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import (
    BoundCost,
    RaisedItem,
    RankedItem,
    SaturationAccount,
    SearchAccount,
)
from qcompile.compiler.report.report import Report
from qcompile.runtime.evaluation.closeness import Closeness, Gates, Verdict
from tests.command_line import compile_args, run

FAILURE = "output 'y': mean cosine 0.971 is below 0.98 (--min-cosine)"


def failed(**changes: Any) -> Report:
    """A report with one failed gate, about which it knows nothing else."""
    output = Closeness("y", cosine=[0.9713, 0.9711])
    verdict = Verdict([output], [FAILURE], 2)
    report = Report("m.onnx", "cpu", "static", Recipe(), "", "", Gates(), verdict=verdict)
    return replace(report, failures=[FAILURE], **changes)


def test_without_knowledge_only_the_gate_remains() -> None:
    assert next_steps(failed()) == ["--min-cosine 0.9712: accepts the outputs as measured"]


def test_a_report_that_passed_advises_nothing() -> None:
    passed = replace(failed(), failures=[], verdict=Verdict([], [], 2))
    assert next_steps(passed) == []


def test_a_float_model_with_nan_is_not_helped_by_any_option() -> None:
    nan = "the float model's own output 'y' holds NaN or infinity for 1 of 1 feeds"
    assert next_steps(replace(failed(int8_products=2), failures=[FAILURE, nan])) == []


SEARCH = SearchAccount(
    3, 3, 1,
    [RankedItem("a", "ffn-in", 0, 2e-3), RankedItem("b c", "ffn-out", 0, 1e-3)],
    [RaisedItem("a", 2e-3)],
)  # fmt: skip
ROWS = [
    LedgerRow("w/int8", "w", "weight", "int8", (2, 2), 4, "", sqnr_db=31.0),
    LedgerRow("x", "x", "activation", "uint8", (2, 2), 0, "", sqnr_db=12.5),
    LedgerRow("z", "z", "activation", "float", (2, 2), 0, "", sqnr_db=None),
]
COST = BoundCost(4, 1.7, 3.0, "w", "isa: amx")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"notes": [Note("made-up-inputs", "")]}, "--data DATA: outputs were compared on random"),
        ({"notes": [Note("search-advice", "")]}, "--min-cosine 0.98: given as an option, the gate"),
        ({"recipe": Recipe(weight_bits=4)}, "--weight-bits 5 or more: now 4"),
        ({"int8_products": 2}, "--recipe accurate: now 2 matrix multiplications of attention"),
        (
            {"int8_products": 1, "recipe": Recipe(transforms="none")},
            "attention: float in the recipe: now 1 matrix multiplication of attention in int8",
        ),
        ({"search": SEARCH}, "--keep-float 'b c': of what is still quantized"),
        ({"ledger": ROWS}, "--keep-float x: it has the lowest SQNR, 12.5 dB"),
        (
            {"saturation": SaturationAccount("", True, 1, 0, 0, "", [], COST)},
            "the bound on int8 sums adds 1.7 dB of rounding noise to 4 tensors",
        ),
        (
            {"calibration": CalibrationAccount("minmax", 3, 1, 5)},
            "--data with more samples: ranges come from 3 batches only",
        ),
    ],
)
def test_what_is_known_is_said_first(changes: dict[str, Any], said: str) -> None:
    steps = next_steps(failed(**changes))
    assert said in steps[0] and len(steps) == 2
    assert steps[-1].startswith("--min-cosine 0.971")


def test_exact_sums_that_passed_are_said() -> None:
    report = failed()
    assert report.verdict is not None
    exact = Verdict([Closeness("y", cosine=[0.999])], [], 2)
    both = {"exact": exact, "saturating": report.verdict}
    known = replace(report, verdict=replace(report.verdict, by_sums=both))
    assert "with exact int8 sums the gates passed" in next_steps(known)[0]
    both["exact"] = report.verdict
    assert not any("exact int8 sums" in step for step in next_steps(known))


def test_there_are_three_lines_at_most() -> None:
    everything = failed(
        notes=[Note("made-up-inputs", ""), Note("search-advice", "")],
        recipe=Recipe(weight_bits=4),
        int8_products=2,
        search=SEARCH,
    )
    assert len(next_steps(everything)) == MOST


def test_the_limits_that_accept_what_was_measured_do(model: Path, data: Path) -> None:
    strict = Gates(min_cosine=1, min_worst_cosine=1, max_abs=1e-9, min_r2=1, min_sqnr=300)
    options = qcompile.Options(bench=False)
    with pytest.raises(qcompile.RejectedError) as caught:
        qcompile.compile(model, data, recipe="per-tensor", gates=strict, options=options)
    report = caught.value.result.report
    assert 0 < len(report.next_steps) <= MOST and report.verdict is not None
    limits = dict(accepting_limits(report, report.verdict))
    assert len(limits) == 5
    own = {option[2:].replace("-", "_"): limit for option, limit in limits.items()}
    reached = replace(strict, **own)
    qcompile.compile(model, data, recipe="per-tensor", gates=reached, options=options)


def test_compile_shows_them(model: Path, data: Path) -> None:
    args = compile_args(model, data, "--recipe", "per-tensor", "--max-abs", "1e-9")
    shown = run(*args, "--search-time", 0).stdout
    assert shown.count("next step: ") == MOST
