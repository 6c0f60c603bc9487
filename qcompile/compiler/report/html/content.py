"""Bytes by kind, what stayed float and why, and the ledger of all tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from qcompile.compiler.report import ledger
from qcompile.compiler.report.html import units
from qcompile.compiler.report.html.charts import stacked, swatch
from qcompile.compiler.report.html.markup import Child, Markup, join, tag
from qcompile.compiler.report.html.tables import Cell, Column, plain, table
from qcompile.compiler.report.ledger import LedgerRow, Summary

Plain: TypeAlias = dict[str, Any]
_COLOURS = {"parameter": "kind-4", "quantization": "kind-3", "structure": "kind-6"}
_LISTED = 60  # names under one reason; all are in the table of tensors


# ---- bytes


def bytes_by_kind(report: Plain) -> Markup:
    """One bar for the float model and one for the compiled one, on one scale; then a table."""
    new = {(s.kind, s.dtype): s for s in ledger.summarize_rows(ledger.read_rows(report)) if s.bytes}
    old = {(s.kind, s.dtype): s for s in _before(report) if s.bytes}
    keys = sorted(new.keys() | old.keys(), key=lambda k: -max(_bytes(old, k), _bytes(new, k)))
    colours = {k: _colour(*k) for k in keys}
    whole = max(report["float_bytes"], report["bytes"])
    bars = [
        tag(
            "li",
            tag("span", what, class_="label"),
            stacked(_parts(found, keys, colours), whole, f"{what}: {units.size(total)}"),
            tag("span", units.size(total), class_="number"),
        )
        for what, found, total in (
            ("float", old, report["float_bytes"]),
            ("compiled", new, report["bytes"]),
        )
        if found
    ]
    rows = [[*_name(k, colours[k]), *_figures(old.get(k)), *_figures(new.get(k))] for k in keys]
    heads = ("content", "float: tensors", "bytes", "compiled: tensors", "bytes")
    return join([tag("ul", bars, class_="stacks"), plain(heads, rows, "Bytes by kind")])


def _colour(kind: str, dtype: str) -> str:
    if kind == "weight":
        return "float" if "float" in dtype else "compiled" if dtype == "int8" else "kind-1"
    return _COLOURS.get(kind, "kind-5")


def _before(report: Plain) -> list[Summary]:
    return [Summary(**s) for s in report.get("float_content", [])]


def _bytes(found: dict[tuple[str, str], Summary], key: tuple[str, str]) -> int:
    return found[key].bytes if key in found else 0


def _parts(
    found: dict[tuple[str, str], Summary],
    keys: Sequence[tuple[str, str]],
    colours: dict[tuple[str, str], str],
) -> list[tuple[float, str, str]]:
    return [
        (found[k].bytes, colours[k], f"{_spelled(k)}: {units.size(found[k].bytes)}")
        for k in keys
        if k in found
    ]


def _name(key: tuple[str, str], colour: str) -> list[Child]:
    return [join([swatch(colour), f" {_spelled(key)}"])]


def _spelled(key: tuple[str, str]) -> str:
    """int8 weight"""
    return " ".join(reversed(key)).strip()


def _figures(found: Summary | None) -> list[str]:
    return (
        [units.NONE, units.NONE] if found is None else [f"{found.count:,}", units.size(found.bytes)]
    )


# ---- what stayed float


def kept_float(report: Plain) -> Markup:
    """Float weights and activations by reason, those with the most bytes first."""
    groups: dict[tuple[str, str], list[LedgerRow]] = {}
    for row in ledger.read_rows(report):
        if row.kind in ("weight", "activation") and row.dtype.startswith("float"):
            groups.setdefault((row.kind, row.reason), []).append(row)
    if not groups:
        return tag("p", "Nothing: every weight and every activation is quantized.")
    order = sorted(groups.items(), key=lambda g: (g[0][0] != "weight", -_sum(g[1]), -len(g[1])))
    return join(_reason(kind, why, found) for (kind, why), found in order)


def _sum(rows: Iterable[LedgerRow]) -> int:
    return sum(r.bytes for r in rows)


def _reason(kind: str, why: str, found: Sequence[LedgerRow]) -> Markup:
    plural = "activations" if kind == "activation" else "weights"
    total = units.count(len(found), kind, plural)
    if kind == "weight":
        total += f", {units.size(_sum(found))}"
    ranked = sorted(found, key=lambda r: (-r.bytes, r.tensor))
    items = [tag("li", tag("code", r.tensor), _own_size(r)) for r in ranked[:_LISTED]]
    if len(ranked) > _LISTED:
        items.append(tag("li", f"and {len(ranked) - _LISTED} more, in the table of tensors"))
    head = tag("summary", tag("span", why), tag("span", total, class_="number"))
    return tag("details", head, tag("ul", items, class_="names"), class_="reason")


def _own_size(row: LedgerRow) -> str:
    return f" {units.size(row.bytes)}" if row.bytes else ""


# ---- the ledger


_COLUMNS = (
    Column("tensor"),
    Column("kind", choice=True),
    Column("type", choice=True),
    Column("shape"),
    Column("bytes", "number"),
    Column("computed in", choice=True),
    Column("in memory", choice=True),
    Column("bytes in memory", "number"),
    Column("range", "number"),
    Column("SQNR, dB", "number"),
    Column("why"),
)


def tensors(report: Plain) -> Markup:
    """One row per tensor, the largest first, and the sums of bytes in the file and in memory."""
    rows = sorted(ledger.read_rows(report), key=lambda r: (-r.bytes, r.kind, r.name))
    total = f"{units.size(_sum(rows))} in the file"
    held = [row.memory for row in rows if row.memory is not None]
    if held:  # not in reports of earlier versions
        total += f", {units.size(sum(held))} of constants in memory once the model is loaded"
    return join([tag("p", total), table(_COLUMNS, (_row(r) for r in rows), "Tensors")])


def _range(low: float | None, high: float | None) -> Cell:
    """Sorted by its width."""
    if low is None or high is None:
        return Cell(units.NONE)
    return Cell(f"{units.value(low)} … {units.value(high)}", high - low)


def _computed(row: LedgerRow) -> str:
    return f"{row.computed}, rows" if row.looked_up else row.computed or units.NONE


def _row(row: LedgerRow) -> list[Cell]:
    origin = "" if row.name.startswith(row.tensor) else row.tensor
    names = tag("code", row.name), tag("small", "from ", tag("code", origin)) if origin else ""
    return [
        Cell(names, row.name),
        Cell(row.kind),
        Cell(row.dtype or units.NONE, row.dtype),
        Cell(units.shape(row.shape)),
        Cell(f"{row.bytes:,}" if row.bytes else units.NONE, row.bytes),
        Cell(_computed(row), row.computed),
        Cell(row.memory_dtype or units.NONE, row.memory_dtype),
        Cell(f"{row.memory:,}" if row.memory else units.NONE, row.memory or 0),
        _range(row.low, row.high),
        Cell(units.NONE if row.sqnr_db is None else f"{row.sqnr_db:.1f}", row.sqnr_db),
        Cell(row.reason),
    ]
