"""Charts as inline SVG. Lengths along x are percent of the width, so that text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcompile.compiler.report.html.markup import Markup, join, tag

_BAR, _TALL = 12, 22  # pixels


@dataclass(frozen=True)
class Scale:
    """Where a value lies, in percent of the width."""

    low: float
    high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            span = math.log10(self.high / self.low)
            share = math.log10(max(value, self.low) / self.low) / span if span else 0.0
        else:
            share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def ticks(self) -> list[float]:
        """Round values, at most seven."""
        return _decades(self.low, self.high) if self.logarithmic else _round(self.low, self.high)


def _decades(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first) / 5))
    return [10.0**e for e in range(first, last + 1, step)]


def _round(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, int(high / step + 1e-9) + 1)]


def percent(value: float) -> str:
    """A length for an attribute."""
    return f"{value:g}%"


def bar(share: float, kind: str, label: str, height: int = _BAR) -> Markup:
    """One horizontal bar, ``share`` percent of the width; at least visible if not zero."""
    width = max(share, 0.3) if share > 0 else 0.0
    return tag(
        "svg",
        tag("rect", class_=kind, width=percent(width), height=height, rx=2),
        class_="chart",
        height=height,
        width="100%",
        role="img",
        aria_label=label,
    )


def point(place: float, kind: str, label: str) -> Markup:
    """A dot at ``place`` percent of the width, for axes that do not begin at zero."""
    middle = _BAR / 2
    return tag(
        "svg",
        tag("line", class_="track", x1="0%", x2=percent(place), y1=middle, y2=middle),
        tag("circle", class_=f"dot {kind}", cx=percent(place), cy=middle, r=5),
        class_="chart",
        height=_BAR,
        width="100%",
        role="img",
        aria_label=label,
    )


def swatch(kind: str) -> Markup:
    """The mark of a legend: a dot or a square."""
    dot = tag("circle", class_=kind, cx=6, cy=6, r=5)
    square = tag("rect", class_=kind, width=12, height=12, rx=2)
    mark = dot if kind.startswith("dot") else square
    return tag("svg", mark, class_="key", width=12, height=12, aria_hidden="true")


def stacked(parts: Sequence[tuple[float, str, str]], whole: float, label: str) -> Markup:
    """One bar with a part for each (value, kind, name); ``whole`` is the full width."""
    rects, start = [], 0.0
    for value, kind, name in parts:
        width = 100 * value / whole if whole else 0.0
        rects.append(
            tag(
                "rect",
                tag("title", name),
                class_=kind,
                x=percent(round(start, 3)),
                width=percent(round(width, 3)),
                height=_TALL,
            )
        )
        start += width
    return tag(
        "svg", rects, class_="chart", height=_TALL, width="100%", role="img", aria_label=label
    )


def axis(scale: Scale, spell: Callable[[float], str], title: str) -> Markup:
    """Ticks with labels below a column of bars, and a title."""
    ticks = []
    for value in scale.ticks():
        at = scale(value)
        anchor = "start" if at < 2 else "end" if at > 98 else "middle"
        ticks.append(
            join(
                [
                    tag("line", class_="tick", x1=percent(at), x2=percent(at), y1=0, y2=4),
                    tag("text", spell(value), x=percent(at), y=16, text_anchor=anchor),
                ]
            )
        )
    rule = tag("line", class_="tick", x1="0%", x2="100%", y1=0.5, y2=0.5)
    return tag(
        "div",
        tag("svg", rule, ticks, class_="chart axis", height=20, width="100%", aria_hidden="true"),
        tag("p", title, class_="axis-title"),
    )


def dumbbell(before: float, after: float, label: str) -> Markup:
    """A line with dots at two places, both in percent of the width."""
    middle = _TALL / 2
    low, high = min(before, after), max(before, after)
    kind = "link better" if after >= before else "link worse"
    return tag(
        "svg",
        tag("line", class_="track", x1="0%", x2="100%", y1=middle, y2=middle),
        tag("line", class_=kind, x1=percent(low), x2=percent(high), y1=middle, y2=middle),
        tag("circle", class_="dot float", cx=percent(before), cy=middle, r=4),
        tag("circle", class_="dot compiled", cx=percent(after), cy=middle, r=5),
        class_="chart dumbbell",
        height=_TALL,
        width="100%",
        role="img",
        aria_label=label,
    )


def interval(low: float, middle: float, high: float, one: float, label: str) -> Markup:
    """An interval with its middle, and a mark at ``one``, all in percent of the width."""
    half = _TALL / 2
    return tag(
        "svg",
        tag("line", class_="track", x1="0%", x2="100%", y1=half, y2=half),
        tag("line", class_="gate", x1=percent(one), x2=percent(one), y1=3, y2=_TALL - 3),
        tag("line", class_="link better", x1=percent(low), x2=percent(high), y1=half, y2=half),
        tag("circle", class_="dot compiled", cx=percent(middle), cy=half, r=5),
        class_="chart dumbbell",
        height=_TALL,
        width="100%",
        role="img",
        aria_label=label,
    )
