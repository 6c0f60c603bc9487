"""The section on training: metric, curves, agreement, and what was not trained."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from qcompile.compiler.report import html
from qcompile.compiler.report.html import training
from qcompile.compiler.report.records import (
    TrainingAccount,
    TrainingMetric,
    TrainingPoint,
    Untrained,
)
from qcompile.runtime.evaluation.agreement import Agreement
from qcompile.system.json_values import from_json, json_value
from tests.compiler.report.html.reports import HOSTILE, compiled

CURVE = [
    TrainingPoint(0, 0.0, None, 0.5),
    TrainingPoint(10, 1.0, 0.9, 0.8),
    TrainingPoint(20, 2.0, 0.3, 0.7),
]
AGREEMENT = Agreement(8, 8, 8, 2e-6, 1e-6, 1e-4)
ACCOUNT = TrainingAccount(
    "classification", False, "cpu", "2.13.0", 100.0, 20, 10, 32, 5e-5, 1e-3, 0, 30, 40,
    [Untrained("scores", "no range")], CURVE, AGREEMENT, replace(AGREEMENT, argmax_equal=7),
    TrainingMetric("accuracy", 8, 90.0, 50.0, 80.0, 80.0, 10.0, 1.0, 0.125),
)  # fmt: skip


def report(account: TrainingAccount = ACCOUNT) -> dict[str, Any]:
    return {"training": json_value(account)}


def places(page: str, what: str) -> list[float]:
    return [float(x) for x in re.findall(rf'<circle[^>]* {what}="([\d.]+)', page)]


def test_the_curve_goes_from_left_to_right_and_better_is_higher() -> None:
    drawn = str(training.curve([(0, 0.5), (10, 0.8), (20, 0.7)], "accuracy", 10, 0.9))
    across, down = places(drawn, "cx")[1:], places(drawn, "cy")[1:]  # the first is the legend
    assert across == [0.0, 50.0, 100.0]
    assert down[1] < down[2] < down[0]
    assert places(drawn, "r")[1:] == [4, 7, 4] and drawn.count("link better") == 2
    level = re.search(r'class="gate"[^>]* y1="([\d.]+)"', drawn)
    assert level is not None and float(level[1]) < min(down)


def test_nothing_to_draw() -> None:
    assert training.training({}) is None and training.training({"training": {}}) is None
    assert training.curve([(0, 0.5)], "loss", 0) is None


def test_it_is_a_section_of_the_page() -> None:
    whole = compiled()
    assert 'id="training"' not in html.page(whole)
    shown = html.page(whole | report())
    assert 'id="training"' in shown
    for text in (
        "quantized by calibration alone",
        "−40.00",
        "7 of 8",
        "no range",
        "1.0e−6",
        "12.50%",
    ):
        assert text in shown


def test_names_are_escaped() -> None:
    found = replace(ACCOUNT, untrained=[Untrained(HOSTILE, HOSTILE)], objective=HOSTILE)
    assert "<img src=x" not in html.page(compiled() | report(found))


def test_without_evaluation_and_without_verification() -> None:
    curve = [replace(point, metric=float("nan")) for point in CURVE]
    found = replace(ACCOUNT, metric=None, agreement=None, curve=curve, distilled=True)
    shown = str(training.training(report(found)))
    assert "without labels" in shown and "compiled file" not in shown and "loss" in shown


def test_a_difference_that_is_not_finite_is_shown() -> None:
    found = replace(ACCOUNT, agreement=replace(AGREEMENT, rms=float("nan"), largest=float("inf")))
    assert json_value(found)["agreement"]["rms"] is None
    assert str(training.training(report(found))).count("not finite") == 2


def test_it_reads_back() -> None:
    assert from_json(TrainingAccount, json_value(ACCOUNT)) == ACCOUNT
