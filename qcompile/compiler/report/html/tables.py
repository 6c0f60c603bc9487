"""Tables that the page's script makes searchable, sortable and filterable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcompile.compiler.report.html.markup import Child, Markup, tag


@dataclass(frozen=True)
class Column:
    """``kind``: "text", or "number", which sorts by ``data-v``. ``choice``: rows can be filtered by
    its values, also those of ``data-v``."""

    title: str
    kind: str = "text"
    choice: bool = False


@dataclass(frozen=True)
class Cell:
    """``key``: the value to sort and filter by, if that is not the text."""

    content: Child
    key: str | float | None = None


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], name: str) -> Markup:
    """A table in a scrolling region, to which the script adds controls."""
    heads = [
        tag(
            "th",
            c.title,
            scope="col",
            class_=_class(c),
            data_kind=c.kind,
            data_choice=c.choice,
        )
        for c in columns
    ]
    body = [tag("tr", [_cell(*pair) for pair in zip(columns, row, strict=True)]) for row in rows]
    made = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), class_="plain rows")
    return tag("div", scrolling(made, name, "scroll tall"), class_="explorer", data_name=name)


def plain(titles: Sequence[str], rows: Iterable[Sequence[Child]], name: str) -> Markup:
    """A small table whose first column names its rows; others hold figures."""
    heads = [tag("th", t, scope="col", class_="number" if i else None)
             for i, t in enumerate(titles)]  # fmt: skip
    body = [
        tag("tr", tag("th", row[0], scope="row"), [tag("td", c, class_="number") for c in row[1:]])
        for row in rows
    ]
    return scrolling(
        tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), class_="plain"), name
    )


def scrolling(made: Markup, name: str, kind: str = "scroll") -> Markup:
    """A table in a region that scrolls on its own, also by keys; no section has the same name."""
    label = f"Table: {name}"
    return tag("div", made, class_=kind, tabindex=0, role="region", aria_label=label)


def _class(column: Column) -> str | None:
    return "number" if column.kind == "number" else None


def _cell(column: Column, cell: Cell) -> Markup:
    return tag("td", cell.content, class_=_class(column), data_v=cell.key)
