"""Which tensors cost the most accuracy: the error of each one quantized alone, logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qcompile.html import units
from qcompile.html.charts import Scale, axis, bar, swatch
from qcompile.html.markup import Markup, join, tag

Plain: TypeAlias = dict[str, Any]
_SHOWN = 40
_DECADES = 4  # below the largest error


@dataclass(frozen=True)
class Item:
    """``error`` is 1 - cosine, None where there was no time to measure."""

    name: str
    where: str
    error: float | None
    lifted: bool


def of_search(report: Plain) -> Markup | None:
    """What the search measured and lifted; None where none ran."""
    search = report["search"]
    if not search:
        return None
    lifted = {x["item"]: x["error_alone"] for x in search["lifted"]}
    ranking = search.get("ranking") or [
        {"item": name, "role": "", "layer": None, "error_alone": error}
        for name, error in lifted.items()
    ]
    items = [
        Item(r["item"], place(r["role"], r["layer"]), r["error_alone"], r["item"] in lifted)
        for r in ranking
    ]
    said = (
        f"A gate was missed, so {search['items']} items were ranked by the output error that each "
        "causes when it alone is quantized, in "
        f"{units.count(search['measurements'], 'measurement')}; {len(lifted)} of them have more "
        "bits now."
    )
    return join([tag("p", said, class_="lead"), chart(items)])


def place(roles: str, layer: int | None) -> str:
    """layer 3 · ffn-out"""
    return roles if layer is None else f"layer {layer} · {roles}"


def chart(items: Sequence[Item]) -> Markup:
    """Bars, the largest first; the tail in a fold."""
    known = [i.error for i in items if i.error]
    if not known:
        return tag("p", "No item has an error that could be measured.")
    most = max(known)
    scale = Scale(max(min(known), most * 10.0**-_DECADES), most * 1.05, logarithmic=True)
    foot = tag(
        "li",
        tag("span"),
        axis(scale, _power, "1 − cosine of the outputs, logarithmic"),
        tag("span"),
    )
    rows = [_row(i, scale) for i in items]
    legend = None
    if any(i.lifted for i in items):
        legend = tag(
            "ul",
            tag("li", swatch("compiled"), " as planned"),
            tag("li", swatch("outlier"), " lifted to more bits"),
            class_="legend",
        )
    more = tag(
        "details",
        tag("summary", f"{len(rows) - _SHOWN} more"),
        tag("ul", rows[_SHOWN:], foot, class_="ranking"),
    )
    head = tag("ul", rows[:_SHOWN], foot, class_="ranking")
    return join([legend, head, more if len(rows) > _SHOWN else None])


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−")


def _row(item: Item, scale: Scale) -> Markup:
    shown = "not measured" if item.error is None else units.error(item.error)
    label = tag(
        "span", tag("code", item.name), tag("small", item.where), class_="label", title=item.name
    )
    kind = "outlier" if item.lifted else "compiled"
    length = scale(item.error) if item.error else 0.0
    drawn = bar(length, kind, f"{item.name}: {shown}{', lifted' if item.lifted else ''}")
    return tag("li", label, drawn, tag("span", shown, class_="number"))
