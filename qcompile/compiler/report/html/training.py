"""What ``train`` learned: the metric of each form of the model, curves of metric and loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from qcompile.compiler.report.html import units
from qcompile.compiler.report.html.charts import Scale, axis, percent, swatch
from qcompile.compiler.report.html.markup import Markup, join, tag
from qcompile.compiler.report.html.tables import plain
from qcompile.compiler.report.records import TrainingAccount, TrainingMetric, Untrained
from qcompile.runtime.evaluation.agreement import Agreement
from qcompile.system.json_values import from_json

Plain: TypeAlias = dict[str, Any]
Point: TypeAlias = tuple[int, float]
_HEIGHT, _MARGIN = 200, 14  # pixels


def training(report: Plain) -> Markup | None:
    """Metric, curves, agreement and what stayed as calibrated; None if nothing was trained."""
    if not report.get("training"):
        return None
    found: TrainingAccount = from_json(TrainingAccount, report["training"])
    metric = found.metric
    measured = [(p.step, p.metric) for p in found.curve if math.isfinite(p.metric)]
    losses = [(p.step, p.loss) for p in found.curve if p.loss is not None]
    name = metric.name if metric is not None else "metric"
    return join(
        [
            tag("p", _lead(found), class_="lead"),
            None if metric is None else _metrics(metric),
            None if metric is None or metric.flips is None else _flips(metric.flips),
            curve(measured, name, found.best_step, None if metric is None else metric.float),
            curve(losses, "loss", found.best_step),
            _agreements(found),
            _untrained(found.untrained),
        ]
    )


def _lead(found: TrainingAccount) -> str:
    how = "from the float model, without labels" if found.distilled else "from labels"
    return (
        f"{found.objective} {how}: {units.count(found.steps, 'step')} of "
        f"{units.count(found.batch_size, 'text')} in {units.duration(found.seconds)} on "
        f"{found.device}, seed {found.seed}; rate {found.learning_rate:g}, of scales "
        f"{found.range_rate:g}. Trained: {units.count(found.weights, 'constant')} and "
        f"{units.count(found.ranges, 'set')} of scales or zero points. The state of step "
        f"{found.best_step} was kept, the best on the evaluation data."
    )


def _metrics(metric: TrainingMetric) -> Markup:
    rows = [
        ["float", f"{metric.float:.2f}", ""],
        ["quantized by calibration alone", *_against(metric, metric.calibrated)],
        ["trained, in torch", *_against(metric, metric.trained)],
        ["compiled file", *_against(metric, metric.compiled)],
    ]
    heads = (units.count(metric.samples, "text"), metric.name, "difference, points")
    return plain(heads, rows, "Metric")


def _flips(share: float) -> Markup:
    return tag("p", f"Another class than the float model's: {share:.2%} of all decisions.")


def _against(metric: TrainingMetric, value: float) -> list[str]:
    return [f"{value:.2f}", f"{value - metric.float:+.2f}".replace("-", "−")]


def curve(
    points: Sequence[Point], name: str, best: int, reference: float | None = None
) -> Markup | None:
    """A line over steps, the best step marked; ``reference``: of the float model."""
    if len(points) < 2:
        return None
    values = [value for _, value in points] + ([] if reference is None else [reference])
    across, down = Scale(0, max(step for step, _ in points)), Scale(min(values), max(values))
    pairs = pairwise(points)
    plot = tag(
        "svg",
        [_gridline(down, tick) for tick in down.ticks()],
        None if reference is None else _level(down, reference),
        [_segment(across, down, *pair) for pair in pairs],
        [_dot(across, down, point, name, chosen=point[0] == best) for point in points],
        class_="chart curve",
        height=_HEIGHT,
        width="100%",
        role="img",
        aria_label=f"{name} over steps: first {points[0][1]:.4g}, last {points[-1][1]:.4g}",
    )
    items = [tag("li", swatch("dot compiled"), f" {name}; large: the step that was kept")]
    if reference is not None:
        items.append(tag("li", f"Line: float model, {reference:.4f}"))
    legend = tag("ul", items, class_="legend")
    return tag("div", legend, plot, axis(across, lambda v: f"{v:g}", "steps"), class_="panel")


def _height(scale: Scale, value: float) -> float:
    """Pixels from the top; larger values are higher."""
    return round(_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * scale(value) / 100, 1)


def _gridline(scale: Scale, value: float) -> Markup:
    y = _height(scale, value)
    return join(
        [
            tag("line", class_="track", x1="0%", x2="100%", y1=y, y2=y),
            tag("text", f"{value:.4g}", x="0%", y=round(y - 3, 1)),
        ]
    )


def _level(scale: Scale, value: float) -> Markup:
    y = _height(scale, value)
    return tag("line", tag("title", f"float: {value:.4f}"), class_="gate",
               x1="0%", x2="100%", y1=y, y2=y)  # fmt: skip


def _segment(across: Scale, down: Scale, start: Point, end: Point) -> Markup:
    return tag(
        "line",
        class_="link better",
        x1=percent(across(start[0])),
        x2=percent(across(end[0])),
        y1=_height(down, start[1]),
        y2=_height(down, end[1]),
    )


def _dot(across: Scale, down: Scale, point: Point, name: str, *, chosen: bool) -> Markup:
    step, value = point
    return tag(
        "circle",
        tag("title", f"step {step}: {name} {value:.4g}"),
        class_="dot compiled",
        cx=percent(across(step)),
        cy=_height(down, value),
        r=7 if chosen else 4,
    )


def _agreements(found: TrainingAccount) -> Markup:
    pairs: list[tuple[str, Agreement | None]] = [
        ("float model, in torch and in ONNX Runtime", found.float_agreement),
        ("trained module and compiled file", found.agreement),
    ]
    rows = [
        [what, f"{a.samples:,}", _error(a.rms), units.error(a.limit), _error(a.largest),
         f"{a.argmax_equal:,} of {a.decisions:,}"]
        for what, a in pairs if a is not None
    ]  # fmt: skip
    heads = ("the same outputs", "texts", "RMS difference", "limit", "largest", "same argmax")
    return plain(heads, rows, "Agreement of torch and ONNX Runtime")


def _error(value: float) -> str:
    return units.error(value) if math.isfinite(value) else "not finite"


def _untrained(found: Sequence[Untrained]) -> Markup | None:
    if not found:
        return None
    rows = [[tag("code", one.tensor), one.reason] for one in found]
    return join([tag("h3", "Not trained"), plain(("tensor", "why"), rows, "Not trained")])
