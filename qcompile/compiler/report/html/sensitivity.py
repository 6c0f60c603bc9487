"""Which tensors cost the most accuracy: the error of each one quantized alone, on a log scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qcompile.compiler.report.html import units
from qcompile.compiler.report.html.charts import Scale, axis, point, swatch
from qcompile.compiler.report.html.headline import card, cards
from qcompile.compiler.report.html.markup import Markup, join, tag
from qcompile.compiler.report.html.tables import Cell, Column, table
from qcompile.compiler.report.records import RankedItem, SearchAccount
from qcompile.system.json_values import from_json

Plain: TypeAlias = dict[str, Any]
_SHOWN = 40
_DECADES = 4  # below the largest error


@dataclass(frozen=True)
class Item:
    """``error`` is 1 - cosine or half of 1 - R², None where there was no time to measure."""

    name: str
    where: str
    error: float | None
    raised: bool


def of_search(report: Plain) -> Markup | None:
    """What the search measured and raised; None where none ran."""
    if not report["search"]:
        return None
    search: SearchAccount = from_json(SearchAccount, {"ranking": [], **report["search"]})
    raised = {x.item for x in search.raised}
    ranking = search.ranking or [RankedItem(x.item, "", None, x.error_alone) for x in search.raised]
    items = [Item(r.item, place(r.role, r.layer), r.error_alone, r.item in raised) for r in ranking]
    text = (
        f"A gate failed, so {search.items} items were ranked by the output error that each "
        "causes when it alone is quantized, in "
        f"{units.count(search.measurements, 'measurement')}; {len(raised)} of them were raised to "
        "more bits."
    )
    return join([tag("p", text, class_="lead"), chart(items)])


def place(roles: str, layer: int | None) -> str:
    """layer 3 · ffn-out"""
    return roles if layer is None else f"layer {layer} · {roles}"


def chart(items: Sequence[Item]) -> Markup:
    """Dots on a logarithmic axis, the largest error first; the tail is folded."""
    errors = [i.error for i in items if i.error]
    if not errors:
        return tag("p", "No item has an error that could be measured.")
    most = max(errors)
    scale = Scale(max(min(errors), most * 10.0**-_DECADES), most * 1.05, logarithmic=True)
    foot = tag(
        "li",
        tag("span"),
        axis(scale, _power, "error of the outputs (1 − cosine or ½ − ½ R²), logarithmic"),
        tag("span"),
    )
    rows = [_row(i, scale) for i in items]
    legend = None
    if any(i.raised for i in items):
        legend = tag(
            "ul",
            tag("li", swatch("dot compiled"), " as planned"),
            tag("li", swatch("dot worst"), " raised to more bits"),
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
    label = tag("span", item.where, tag("code", item.name), class_="label", title=item.name)
    kind = "worst" if item.raised else "compiled"
    text = f"{item.name}: {shown}{', raised' if item.raised else ''}"
    drawn = point(scale(item.error), kind, text) if item.error else tag("span")
    return tag("li", label, drawn, tag("span", shown, class_="number"))


# ---- the page of a ranking


_COLUMNS = (
    Column("rank", "number"),
    Column("item"),
    Column("role", choice=True),
    Column("layer", "number"),
    Column("kind", choice=True),
    Column("tensors", "number"),
    Column("alone: error", "number"),
    Column("SQNR, dB", "number"),
    Column("raised: error left", "number"),
)


def summary(report: Plain) -> Markup:
    """The error with everything quantized, and the most sensitive item."""
    whole, rows = report["quantized"], report["rows"]
    facts = [f"target {report['target']}", report["mode"], f"by {report['by']}"]
    shown = [
        card(
            "All quantized",
            units.cosine(whole["mean_cosine"]),
            f"mean cosine to float, worst {units.cosine(whole['worst_cosine'])}; error "
            f"{units.error(whole['error'])}",
        )
    ]
    measured = [r for r in rows if r["alone"] is not None]
    if measured:
        first = measured[0]
        where = place(first["roles"], first["layer"])
        error = units.error(first["alone"]["error"])
        shown.append(card("Most sensitive", error, f"error alone: {first['item']}, {where}"))
    policy = report.get("policy")
    if policy is not None:
        raised = units.count(len(policy["lifted"]), "item")
        text = f"predicted mean cosine with {raised} raised"
        shown.append(card("Policy", units.cosine(policy["predicted"]["mean_cosine"]), text))
    head = tag(
        "div",
        tag("h1", report["source"]),
        tag("p", " · ".join(facts), class_="facts"),
        class_="masthead",
    )
    return tag("section", head, cards(*shown), id="summary", aria_label="Summary")


def ranked(report: Plain) -> Markup:
    """The error of each item quantized alone; if only the converse was measured, the error left."""
    policy = report.get("policy") or {"lifted": []}
    which = "alone" if any(r["alone"] for r in report["rows"]) else "lifted"
    items = [
        Item(
            r["item"],
            place(r["roles"], r["layer"]),
            None if r[which] is None else r[which]["error"],
            r["item"] in policy["lifted"],
        )
        for r in report["rows"]
    ]
    texts = {
        "alone": "The output error if only this item is quantized.",
        "lifted": "The output error that remains if only this item is float.",
    }
    return join([tag("p", texts[which], class_="lead"), chart(items)])


def widths(report: Plain) -> Markup | None:
    """The error of each weight alone, by its bits; None where that was not measured."""
    rows = report.get("widths") or []
    if not rows:
        return None
    known = sorted({d["bits"] for row in rows for d in row["measured"]}, reverse=True)
    columns = [Column("weight"), Column("role", choice=True), Column("layer", "number")]
    for bits in known:
        columns += [
            Column(f"{bits} bits: error", "number"),
            Column(f"{bits} bits: worst cosine", "number"),
        ]
    return table(columns, (_width_cells(row, known) for row in rows), "Weights by bits")


def _width_cells(row: Plain, known: Sequence[int]) -> list[Cell]:
    layer = row["layer"]
    cells = [Cell(tag("code", row["item"]), row["item"]), Cell(row["role"])]
    cells.append(Cell(units.NONE if layer is None else layer, layer))
    drops = {d["bits"]: d for d in row["measured"]}
    for bits in known:
        drop = drops.get(bits)
        worst = None if drop is None else drop["worst_cosine"]
        cells += [_error(drop), Cell(units.NONE if worst is None else units.cosine(worst), worst)]
    return cells


def measurements(report: Plain) -> Markup:
    """All measurements, as a table that can be searched and sorted."""
    return table(_COLUMNS, (_cells(i, r) for i, r in enumerate(report["rows"], 1)), "Items")


def _cells(rank: int, row: Plain) -> list[Cell]:
    alone, layer = row["alone"], row["layer"]
    return [
        Cell(rank, rank),
        Cell(tag("code", row["item"]), row["item"]),
        Cell(row["roles"]),
        Cell(units.NONE if layer is None else layer, layer),
        Cell(row["kind"]),
        Cell(row["tensors"], row["tensors"]),
        _error(alone),
        _noise(alone),
        _error(row["lifted"]),
    ]


def _error(score: Plain | None) -> Cell:
    if score is None:
        return Cell(units.NONE)
    return Cell(units.error(score["error"]), score["error"])


def _noise(score: Plain | None) -> Cell:
    if score is None or score["sqnr_db"] is None:
        return Cell(units.NONE)
    return Cell(f"{score['sqnr_db']:.1f}", score["sqnr_db"])
