"""The channels of each quantized layer's input, in steps of its quantizer.

Every channel is a bar from its smallest to its largest value, in steps; channels are sorted, the
widest first, on a square-root scale, so that a single outlier is visible next to hundreds of
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import sqrt
from typing import Any, TypeAlias

from qcompile.compiler.report.channel_views import ChannelSite, ChannelView, StepGroup
from qcompile.compiler.report.html import units
from qcompile.compiler.report.html.charts import Scale, axis, dumbbell, swatch
from qcompile.compiler.report.html.markup import Markup, join, tag
from qcompile.system.json_values import from_json

Plain: TypeAlias = dict[str, Any]
_SHOWN = 6
_OUTLIER = 4  # times the median width
_WIDTH, _HEIGHT = 1000, 255
_WHAT_PASSES_DID = {
    "widen-ranges": "headroom left for unseen data",
    "permute-channels": "channels in another order",
    "migrate-scales": "scales moved from wide channels into the weights",
    "split-outliers": "outlier channels split over more columns",
    "group-scales": "one scale per group of channels",
    "split-groups": "one matrix multiplication per group of channels",
}


def channels(report: Plain) -> Markup | None:
    """The overview of all layers' inputs, and a picture of each; None if there are none."""
    sites: list[ChannelSite] = from_json(list[ChannelSite], report.get("channels", []))
    if not sites:
        return None
    worst = sorted(sites, key=lambda s: s.before.median_steps / s.before.steps)
    first = {id(s) for s in worst[:_SHOWN]}
    shown = [_picture(s) for s in sites if id(s) in first]
    rest = [_picture(s) for s in sites if id(s) not in first]
    more = tag(
        "details",
        tag("summary", f"The other {units.count(len(rest), 'input')}"),
        tag("div", rest, class_="pictures"),
    )
    return join(
        [
            tag("p", _INTRODUCTION, class_="lead"),
            _overview(sites),
            tag(
                "h3", f"The {units.count(len(shown), 'input')} whose channels use the fewest steps"
            ),
            tag("p", _HOW_TO_READ, class_="lead"),
            _legend(),
            tag("div", shown, class_="pictures"),
            more if rest else None,
        ]
    )


_INTRODUCTION = (
    "A quantizer has one step size, or one per group, for all channels that it covers. A few wide "
    "channels make the step large, so the others use few steps, which costs accuracy. The chart "
    "shows how many steps the median channel of each quantized layer's input uses: as calibrated, "
    "and as compiled."
)


_HOW_TO_READ = (
    "Each channel is a bar from its smallest to its largest value, in steps of its quantizer. "
    "Channels are ordered from left to right by width, the widest first, on a square-root scale. "
    "Empty space above and below the bars is steps that these channels do not use."
)


def name(site: ChannelSite) -> str:
    """Layer and role of the outputs of the layers that read it: layer 3 · ffn-out."""
    where = "" if site.layer is None else f"layer {site.layer} · "
    return f"{where}{site.role or 'linear'}"


# ---- overview


def _overview(sites: Sequence[ChannelSite]) -> Markup:
    rows, layer = [], sites[0].layer
    for site in sites:
        old, new = _used(site.before), _used(site.after)
        kind, layer = ("first" if site.layer != layer else None), site.layer
        figures = f"{site.before.median_steps:.0f} → {site.after.median_steps:.0f}"
        label = f"{name(site)}: median channel {figures} steps"
        rows.append(
            tag(
                "li",
                tag("span", name(site), class_="label", title=site.tensor),
                dumbbell(100 * old, 100 * new, label),
                tag("span", figures, class_="number"),
                class_=kind,
            )
        )
    steps = {view.steps for s in sites for view in (s.before, s.after)}
    scale = Scale(0, max(steps) if len(steps) == 1 else 100)
    title = (
        f"steps that the median channel uses, of {max(steps)}"
        if len(steps) == 1
        else "steps that the median channel uses, in percent of all"
    )
    legend = tag(
        "ul",
        tag("li", swatch("dot float"), " as calibrated"),
        tag("li", swatch("dot compiled"), " as compiled"),
        class_="legend",
    )
    foot = tag("li", tag("span"), axis(scale, lambda v: f"{v:g}", title), tag("span"))
    return join([legend, tag("ul", rows, foot, class_="overview")])


def _used(view: ChannelView) -> float:
    """Share of the steps that the median channel spans."""
    return view.median_steps / view.steps


def _legend() -> Markup:
    return tag(
        "ul",
        tag("li", swatch("float"), " as calibrated"),
        tag("li", swatch("compiled"), " as compiled"),
        tag("li", swatch("outlier"), f" over {_OUTLIER} times as wide as the median"),
        tag("li", swatch("group"), " channels that share a scale, where there are several"),
        class_="legend",
    )


# ---- pictures


def _picture(site: ChannelSite) -> Markup:
    head = tag("h4", name(site))
    facts = [units.count(site.channels, "channel")]
    if site.readers > 1:
        facts.append(f"read by {site.readers} layers")
    return tag(
        "figure",
        tag("figcaption", head, tag("code", site.tensor), tag("p", ", ".join(facts))),
        tag(
            "div",
            _panel("as calibrated", site.before, site.ends, "float"),
            _panel("as compiled", site.after, site.ends, "compiled"),
            class_="panels",
        ),
        tag("p", _done(site), class_="done"),
        class_="picture",
    )


def _done(site: ChannelSite) -> str:
    changes = [_WHAT_PASSES_DID.get(p, f"changed by {p}") for p in site.passes]
    added = site.columns - site.channels
    if added > 0:
        changes.append(f"{units.count(added, 'column')} added")
    return "; ".join(changes).capitalize() or "Unchanged"


def _panel(title: str, view: ChannelView, ends: Sequence[int], kind: str) -> Markup:
    steps, groups = view.steps, view.groups
    span = f"{units.value(view.low)} … {units.value(view.high)}"
    widths = (
        f"step {units.value(groups[0].step)}"
        if len(groups) == 1
        else f"{len(groups)} groups, steps {units.value(groups[0].step)} to "
        f"{units.value(groups[-1].step)}"
    )
    used = f"median uses {view.median_steps:.0f} of {steps} steps"
    label = f"{title}: {used}; range {span}; {widths}"
    return tag(
        "div",
        tag("p", tag("b", title), " ", used),
        tag("div", _steps(steps), _plot(view, ends, kind, label), class_="plot"),
        _ranks(ends[-1]),
        tag("p", f"{span}, {widths}", class_="axis-title"),
        class_="panel",
    )


def _steps(steps: int) -> Markup:
    """The axis on the left: the highest and the lowest step."""
    return tag("div", tag("span", str(steps)), tag("span", "0"), class_="steps", aria_hidden="true")


def _plot(view: ChannelView, ends: Sequence[int], kind: str, label: str) -> Markup:
    """Bars of all bins, and bands of the groups, in a box that scales with the page."""
    total, steps = ends[-1], view.steps
    places = [_place(e, total) for e in (0, *ends)]
    limit = _OUTLIER * max(view.median_steps, steps / 1000)
    bars: dict[str, list[str]] = {kind: [], "outlier": []}
    for (left, right), low, high in zip(pairwise(places), view.lows, view.highs, strict=True):
        top, bottom = _HEIGHT * (1 - high / steps), _HEIGHT * (1 - low / steps)
        wide = high - low > limit and len(view.groups) == 1
        shape = f"M{left:g} {top:.4g}H{right:g}V{max(bottom, top + 1):.4g}H{left:g}z"
        bars["outlier" if wide else kind].append(shape)
    return tag(
        "svg",
        _bands(view.groups, total),
        [tag("path", d="".join(shapes), class_=k) for k, shapes in bars.items() if shapes],
        class_="channels",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def _place(rank: int, total: int) -> float:
    return round(_WIDTH * sqrt(rank / total), 1)


def _bands(groups: Sequence[StepGroup], total: int) -> list[Markup]:
    """A band behind every other group, if there are several."""
    ends = list(accumulate((g.channels for g in groups), initial=0))
    made = []
    for i, (start, end) in enumerate(pairwise(ends)):
        if i % 2 == 0 and len(groups) > 1:
            left, right = _place(start, total), _place(end, total)
            made.append(
                tag("rect", class_="group", x=left, width=round(right - left, 1), height=_HEIGHT)
            )
    return made


def _ranks(total: int) -> Markup:
    """The axis below: ranks, on a square-root scale."""
    marks = [1, *(round(total * s**2) for s in (0.25, 0.5, 0.75)), total]
    texts = []
    for rank in dict.fromkeys(marks):
        at = 100 * sqrt((rank - 0.5) / total) if rank == 1 else 100 * sqrt(rank / total)
        anchor = "start" if at < 5 else "end" if at > 95 else "middle"
        texts.append(tag("text", str(rank), x=f"{at:.4g}%", y=11, text_anchor=anchor))
    return tag("svg", texts, class_="chart axis ranks", height=14, width="100%", aria_hidden="true")
