"""The top of the page: the result in three figures, and the verdict of the gates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from qcompile.compiler.report.html import gates, units
from qcompile.compiler.report.html.charts import Scale, axis, bar, interval, swatch
from qcompile.compiler.report.html.markup import Child, Markup, join, tag

Plain: TypeAlias = dict[str, Any]
_OPTION = re.compile(r"\(--[a-z-]+\)")
_MIN_ROUNDS = 4  # below, a bootstrap over rounds says nothing
_ERROR_FLOOR = 1e-6  # 1 - cosine at the right end of its axis


def headline(report: Plain) -> Markup:
    """Title, verdict, on which processors outputs differ, three cards, failures and notes."""
    processors = (report.get("saturation") or {}).get("advice", "")
    return tag(
        "section",
        _title(report),
        tag("p", "Processors: ", processors, class_="processors unknown") if processors else None,
        cards(_size(report), _speed(report), _closeness(report)),
        _failures(report["failures"]),
        _next_steps(report.get("next_steps", [])),
        _notes([note for note in report["notes"] if note != processors]),
        id="summary",
        aria_label="Summary",
    )


def _title(report: Plain) -> Markup:
    facts = [f"target {report['target']}", report["mode"]]
    shown = report["environment"]
    facts.append(f"ONNX Runtime {shown['onnxruntime']}")
    facts += shown["isa"][:1]
    if report.get("away"):  # the target's provider was missing
        facts.append(f"run on {report['away']}, not on the target")
    return tag(
        "div",
        tag("div", tag("h1", report["source"]), _badge(report), class_="title"),
        tag("p", " · ".join(facts), class_="facts"),
        class_="masthead",
    )


def _badge(report: Plain) -> Markup:
    failures = report["failures"]
    if failures:
        # One gate may fail at several outputs, and a search adds what it tried.
        gates = len(set(_OPTION.findall(" ".join(failures)))) or 1
        return tag("span", units.count(gates, "gate") + " failed", class_="badge bad")
    if report["verify"] is None:
        return tag("span", "not verified", class_="badge unknown")
    return tag("span", "all gates passed", class_="badge good")


def _failures(failures: Sequence[str]) -> Markup | None:
    return _box("bad", "Failed", failures) if failures else None


def _next_steps(steps: Sequence[str]) -> Markup | None:
    """What may help, with the option of each step as code; not in reports of earlier versions."""
    lines = []
    for step in steps:
        option, colon, reason = step.partition(": ")
        lines.append(join([tag("code", option), colon, reason]))
    return _box("advice", "What may help", lines) if lines else None


def _notes(notes: Sequence[str]) -> Markup | None:
    return _box("unknown", "Notes", notes) if notes else None


def _box(kind: str, title: str, lines: Sequence[Child]) -> Markup:
    items = [tag("li", line) for line in lines]
    return tag("div", tag("h2", title), tag("ul", items), class_=f"box {kind}")


def cards(*shown: Markup) -> Markup:
    """Figures side by side."""
    return tag("div", shown, class_="cards")


# ---- the three figures


def card(name: str, figure: str, caption: str, *more: Markup | str) -> Markup:
    """One large figure, with a caption and a chart."""
    return tag(
        "div",
        tag("h2", name),
        tag("p", figure, class_="figure"),
        tag("p", caption, class_="caption"),
        *more,
        class_="card",
    )


def _missing(name: str, why: str) -> Markup:
    return tag(
        "div",
        tag("h2", name),
        tag("p", units.NONE, class_="figure"),
        tag("p", why),
        class_="card missing",
    )


def _size(report: Plain) -> Markup:
    old, new = report["float_bytes"], report["bytes"]
    if not (old and new):
        return _missing("Size", "not known")
    word = "smaller" if new <= old else "larger"
    figure = f"{units.times(max(old, new) / min(old, new))} {word}"
    return card(
        "Size",
        figure,
        f"{units.percent(new / old)} of the float file",
        _pair(old, new, units.size),
    )


def _pair(old: float, new: float, spell: Callable[[float], str]) -> Markup:
    """Two bars on one scale, float and compiled."""
    most = max(old, new)
    rows = []
    for name, value, kind in (("float", old, "float"), ("compiled", new, "compiled")):
        shown = spell(value)
        rows += [
            tag("span", name),
            bar(100 * value / most, kind, f"{name}: {shown}"),
            tag("span", shown, class_="number"),
        ]
    return tag("div", rows, class_="pair")


def _speed(report: Plain) -> Markup:
    bench = report["bench"]
    if bench is None:
        return _missing("Speed", "not timed")
    old, new = bench["models"][:2]
    ratio = new["ratio"]
    word = "faster" if ratio <= 1 else "slower"
    figure = f"{units.times(max(ratio, 1 / ratio))} {word}"
    name, dims = next(iter(bench["shapes"].items()), ("no input", []))
    where = f"median; {name} {units.shape(dims)}; {units.count(bench['threads'], 'thread')}"
    return card(
        "Speed",
        figure,
        where,
        _pair(old["median_ms"], new["median_ms"], units.milliseconds),
        _interval(new) if bench["rounds"] >= _MIN_ROUNDS else "",
    )


def _interval(row: Plain) -> Markup:
    """The interval of the speed-up, on an axis that includes 1, no speed-up."""
    low, middle, high = 1 / row["ratio_high"], 1 / row["ratio"], 1 / row["ratio_low"]
    scale = Scale(min(1.0, low) * 0.9, max(1.0, high) * 1.05)
    label = f"95 % interval of the speed-up: {low:.2f} to {high:.2f} times"
    return tag(
        "div",
        interval(scale(low), scale(middle), scale(high), scale(1), label),
        axis(scale, lambda v: f"{v:g}×", label),
    )


def _closeness(report: Plain) -> Markup:
    verdict = report["verify"]
    if verdict is None:
        return _missing("Closeness", "not verified")
    outputs = verdict["outputs"]
    if not outputs:
        return card("Closeness", "equal", f"all of {units.count(verdict['samples'], 'sample')}")
    worst = min(outputs, key=lambda o: o["mean_cosine"])
    caption = (
        f"mean cosine to float of {worst['output']}; {units.count(verdict['samples'], 'sample')}"
    )
    lowest = min(o["worst_cosine"] for o in outputs)
    return card(
        "Closeness",
        units.cosine(worst["mean_cosine"]),
        caption,
        _cosines(worst["mean_cosine"], lowest, report["gates"]),
        _facts(worst, lowest),
        _sums(verdict) or "",
    )


def _sums(verdict: Plain) -> Markup | None:
    """Mean cosines by both kinds of sums, where x86 without VNNI computes others."""
    shown = [
        f"{units.cosine(min(o['mean_cosine'] for o in outputs))}{label}"
        for label, outputs in gates.by_sums(verdict)
        if label and outputs
    ]
    if not shown:
        return None
    return tag("p", f"mean cosine {', '.join(shown)}", class_="caption")


def _facts(output: Plain, lowest: float) -> Markup:
    noise = output["sqnr_db"]
    facts = [
        ("mean", units.cosine(output["mean_cosine"]), "dot compiled"),
        ("worst sample", units.cosine(lowest), "dot worst"),
    ]
    made = [tag("li", swatch(kind), f" {name} {value}") for name, value, kind in facts]
    if noise is not None:
        made.append(tag("li", f"SQNR {noise:.1f} dB"))
    return tag("ul", made, class_="legend")


def _cosines(mean: float, worst: float, gates: Plain) -> Markup:
    """Mean and worst on an axis of cosines that widens towards 1, with the gates."""
    errors = Scale(_ERROR_FLOOR, 1.0, logarithmic=True)

    def place(cosine: float) -> float:
        return round(100 - errors(max(1 - cosine, _ERROR_FLOOR)), 2)

    half = 11
    limits = [(gates["min_cosine"], "mean"), (gates["min_worst_cosine"], "worst")]
    marks = [
        tag("line", tag("title", f"gate of the {what}: {limit:g}"), class_="gate",
            x1=f"{place(limit)}%", x2=f"{place(limit)}%", y1=3, y2=19)
        for limit, what in limits if limit is not None
    ]  # fmt: skip
    ticks = [0.0, 0.9, 0.99, 0.999, 0.9999, 0.99999]
    labels = [
        tag("text", f"{t:g}".lstrip("0") or "0", x=f"{place(t)}%", y=34,
            text_anchor="start" if t == 0 else "middle")
        for t in ticks
    ]  # fmt: skip
    label = f"cosine: mean {units.cosine(mean)}, worst {units.cosine(worst)}"
    drawn = tag(
        "svg",
        tag("line", class_="track", x1="0%", x2="100%", y1=half, y2=half),
        marks,
        tag("circle", class_="dot worst", cx=f"{place(worst)}%", cy=half, r=5),
        tag("circle", class_="dot compiled", cx=f"{place(mean)}%", cy=half, r=5),
        labels,
        class_="chart axis",
        height=38,
        width="100%",
        role="img",
        aria_label=label,
    )
    title = "cosine, logarithmic towards 1; lines are gates" if marks else "cosine"
    return tag("div", drawn, tag("p", title, class_="axis-title"))
