"""A table of figures as notebooks show it: the HTML that ``_repr_html_`` of a result returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()
) -> str:
    """A table with a caption, and notes below it. All text is escaped: names come from models."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(_row(row) for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div><table><caption>{escape(title)}</caption>{table}</table>{below}</div>"


def _row(cells: Sequence[str]) -> str:
    """One row, headed by its first cell."""
    first, *others = map(escape, cells)
    cells_of_row = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr><th scope="row">{first}</th>{cells_of_row}</tr>'
