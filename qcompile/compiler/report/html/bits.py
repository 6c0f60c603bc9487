"""What --max-size chose: size against closeness of compiled models, and bits of each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from qcompile.compiler.report.html import units
from qcompile.compiler.report.html.charts import Scale, axis, percent, swatch
from qcompile.compiler.report.html.markup import Markup, join, tag
from qcompile.compiler.report.html.sensitivity import place
from qcompile.compiler.report.html.tables import Cell, Column, table
from qcompile.compiler.report.records import SizeAccount, SizePoint, WeightBits
from qcompile.system.json_values import from_json

Plain: TypeAlias = dict[str, Any]
_HEIGHT, _MARGIN = 240, 14  # pixels
_FASTEST, _SLOWEST = 160, 20  # hues: green and orange
_FLOOR = 1e-6  # least 1 - cosine that the chart shows
_COLUMNS = (
    Column("weight"),
    Column("role", choice=True),
    Column("bits", "number", choice=True),
    Column("bytes", "number"),
    Column("error at the bits it has without --max-size", "number"),
    Column("error at fewer bits"),
    Column("worst cosine at fewest", "number"),
)


def bits(report: Plain) -> Markup | None:
    """The chart and the table; None where nothing was searched."""
    if not report.get("sizes"):
        return None
    found: SizeAccount = from_json(SizeAccount, report["sizes"])
    lead = (
        f"The closest model with at most {units.size(found.limit)}: "
        f"{units.count(found.measurements, 'measurement')} of single weights, "
        f"{units.count(found.compilations, 'compilation')}. Errors are those of the outputs where "
        "only this weight is quantized."
    )
    rows = (_row(weight) for weight in found.weights)
    return join(
        [
            tag("p", lead, class_="lead"),
            chart(found.points, found.limit),
            table(_COLUMNS, rows, "Bits"),
        ]
    )


def chart(points: Sequence[SizePoint], limit: int) -> Markup | None:
    """Size along x, 1 - cosine along y (logarithmic, closest at the top), latency as colour."""
    compared = [p for p in points if p.mean_cosine is not None]
    if not compared:
        return None
    sizes = [*(p.bytes for p in points), limit]
    room = (max(sizes) - min(sizes)) * 0.05 or max(sizes) * 0.05
    across = Scale(max(min(sizes) - room, 0), max(sizes) + room)
    errors = [_error(p) for p in compared]
    down = Scale(min(errors) / 1.5, max(errors) * 1.5, logarithmic=True)
    lines = [_gridline(down, tick) for tick in _ticks(down)]
    at = percent(across(limit))
    mark = tag("line", class_="gate", x1=at, x2=at, y1=0, y2=_HEIGHT)
    dots = [_dot(p, across, down, _hues(compared)) for p in compared]
    plot = tag(
        "svg",
        lines,
        mark,
        dots,
        class_="chart pareto",
        height=_HEIGHT,
        width="100%",
        role="img",
        aria_label=f"Size against closeness of {len(compared)} compiled models",
    )
    title = "bytes of the file; from bottom to top: cosine, mean over samples"
    return tag("div", _legend(compared), plot, axis(across, units.size, title), class_="panel")


def _error(point: SizePoint) -> float:
    assert point.mean_cosine is not None  # those that were not compared are not drawn
    return max(1 - point.mean_cosine, _FLOOR)


def _ticks(scale: Scale) -> list[float]:
    """Powers of ten, and 2 and 5 times them."""
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    all_ticks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    return [t for t in all_ticks if scale.low <= t <= scale.high]


def _height(scale: Scale, error: float) -> float:
    return round(_MARGIN + (_HEIGHT - 2 * _MARGIN) * scale(error) / 100, 1)


def _gridline(scale: Scale, error: float) -> Markup:
    y = _height(scale, error)
    shown = f"{1 - error:.6f}".rstrip("0")
    return join(
        [
            tag("line", class_="track", x1="0%", x2="100%", y1=y, y2=y),
            tag("text", shown, x="0%", y=round(y - 3, 1)),
        ]
    )


def _hues(points: Sequence[SizePoint]) -> Scale:
    """From the fastest to the slowest of the points, or of a tenth around float's latency."""
    ratios = [p.latency_ratio for p in points if p.latency_ratio is not None]
    return Scale(min(ratios, default=0.95) - 0.02, max(ratios, default=1.05) + 0.02)


def _dot(point: SizePoint, across: Scale, down: Scale, hues: Scale) -> Markup:
    words = [units.size(point.bytes)]
    if point.mean_cosine is not None:
        words.append(f"cosine {units.cosine(point.mean_cosine)}")
    if point.worst_cosine is not None:
        words.append(f"worst {units.cosine(point.worst_cosine)}")
    if point.latency_ratio is not None:
        words.append(f"{point.latency_ratio:.2f} times float's latency")
    words += ["" if point.passed else "a gate failed", "chosen" if point.chosen else ""]
    text = ", ".join(word for word in words if word)
    kind = "dot timed" if point.latency_ratio is not None else "dot float"
    return tag(
        "circle",
        tag("title", text),
        class_=f"{kind}{' chosen' if point.chosen else ''}{'' if point.passed else ' failed'}",
        fill=_colour(point, hues),
        cx=percent(across(point.bytes)),
        cy=_height(down, _error(point)),
        r=8 if point.chosen else 5,
    )


def _colour(point: SizePoint, hues: Scale) -> str | None:
    if point.latency_ratio is None:
        return None
    share = hues(point.latency_ratio) / 100
    return f"hsl({round(_FASTEST + (_SLOWEST - _FASTEST) * share)} 65% 45%)"


def _legend(points: Sequence[SizePoint]) -> Markup:
    ratios = [p.latency_ratio for p in points if p.latency_ratio is not None]
    if ratios:
        ends = f"{min(ratios):.2f} (green) to {max(ratios):.2f} (orange) times float's latency"
        items = [tag("li", f"Colour: {ends}")]
    else:
        items = [tag("li", swatch("dot float"), " not timed")]
    items.append(tag("li", "Large: chosen. Hollow: a gate failed. Line: the limit."))
    return tag("ul", items, class_="legend")


def _row(weight: WeightBits) -> list[Cell]:
    first, few = weight.measured[:1], weight.measured[1:]
    listed = ", ".join(f"{units.error(drop.error)} at {drop.bits}" for drop in few)
    return [
        Cell(tag("code", weight.item), weight.item),
        Cell(place(weight.role, weight.layer), weight.role),
        Cell(weight.bits, weight.bits),
        Cell(f"{weight.bytes:,}", weight.bytes),
        Cell(units.error(first[0].error), first[0].error) if first else Cell(units.NONE),
        Cell(listed or units.NONE),
        Cell(units.cosine(few[-1].worst_cosine), few[-1].worst_cosine) if few else Cell(units.NONE),
    ]
