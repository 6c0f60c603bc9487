"""The gates that were set, the measured values, and the closeness of each output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from qcompile.compiler.report.html import units
from qcompile.compiler.report.html.markup import Markup, join, tag
from qcompile.compiler.report.html.tables import plain, scrolling

Plain: TypeAlias = dict[str, Any]
_LABELS = {"exact": " with exact sums", "saturating": " on x86 without VNNI"}


def gates(report: Plain) -> Markup:
    """Every gate that is set, with what was reached, and all outputs."""
    rows = [_gate(name, limit, found, key, report["failures"]) for key, name, limit, found in
            _reached(report)]  # fmt: skip
    titles = {"gate": "", "limit": "number", "reached": "number", "result": ""}
    heads = [tag("th", title, scope="col", class_=kind) for title, kind in titles.items()]
    table = tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows), class_="plain")
    shown = scrolling(table, "Gates") if rows else tag("p", "No gate was set.")
    cost = _bound_cost((report.get("saturation") or {}).get("cost"))
    checked = _requirements(report.get("requirements"))
    return join([shown, _outputs(report["verify"]), cost, checked])


def _bound_cost(cost: Plain | None) -> Markup | None:
    """What it costs that int8 sums are the same on all processors; None if there is no bound."""
    if cost is None:
        return None
    text = (
        f"No sum of int8 products can saturate on any processor. The bound on weights that "
        f"guarantees this raises the rounding noise of {units.count(cost['tensors'], 'tensor')} by "
        f"{cost['mean_db']:.1f} dB on average compared with plain 8 bits, and by "
        f"{cost['worst_db']:.1f} dB for {cost['worst']}. If the model runs only on processors "
        f"whose sums are exact, {cost['avoided_by']} in the recipe removes the bound."
    )
    return tag("p", text, class_="lead")


def _requirements(checked: dict[str, int] | None) -> Markup | None:
    """The target's requirements for the graph. A failed one is an error, so all are met here."""
    if not checked:
        return None
    rows = [[rule, f"{nodes:,}"] for rule, nodes in checked.items()]
    heads = ("the target's requirements, all met", "nodes checked")
    return plain(heads, rows, "Requirements")


def _reached(report: Plain) -> list[tuple[str, str, float, float | None]]:
    """Key, name, limit and the worst figure of each gate that is set."""
    limits, verdict, bench = report["gates"], report["verify"], report["bench"]
    outputs = verdict["outputs"] if verdict is not None else []

    def worst(key: str, pick: Callable[[list[float]], float], **of: bool) -> float | None:
        chosen = [o for o in outputs if all(o.get(k) == v for k, v in of.items())]
        found = [o[key] for o in chosen if o.get(key) is not None]
        return pick(found) if found else None

    metric = verdict.get("metric") if verdict is not None else None
    rows = {
        "min_cosine": ("mean cosine", worst("mean_cosine", min)),
        "min_worst_cosine": ("worst cosine", worst("worst_cosine", min)),
        "min_r2": ("R² of columns", worst("r2", min, single_number=False)),
        "min_single_r2": ("R² of single numbers", worst("r2", min, single_number=True)),
        "min_sqnr": ("SQNR, dB", worst("sqnr_db", min)),
        "max_flips": ("share of argmax flips", worst("flip_share", max)),
        "max_abs": ("largest difference", worst("max_abs", max)),
        "min_metric": ("metric", metric["compiled"] if metric else None),
        "max_latency_ratio": (
            "latency, compiled over float",
            bench["models"][1]["ratio"] if bench is not None else None,
        ),
        "max_size_ratio": ("size, compiled over float", report["size_ratio"]),
    }
    return [(k, name, limits[k], found) for k, (name, found) in rows.items()
            if limits.get(k) is not None]  # fmt: skip


def _gate(
    name: str, limit: float, found: float | None, key: str, failures: Sequence[str]
) -> Markup:
    """One row. A gate failed if a failure names its option: latency fails by its interval only,
    size by its weights."""
    option = "--" + key.replace("_", "-")
    bound = f"{'≤' if key.startswith('max') else '≥'} {limit:g}"
    state, kind = ("passed", "good")
    if found is None:
        state, kind = ("not measured", "unknown")
    if any(f"({option})" in f for f in failures):
        state, kind = ("failed", "bad")
    shown = units.NONE if found is None else _figure(found, key)
    cells = [
        tag("th", name, tag("code", option, class_="option"), scope="row"),
        tag("td", bound, class_="number"),
        tag("td", shown, class_="number"),
        tag("td", tag("span", state, class_=f"badge small {kind}")),
    ]
    return tag("tr", cells)


def _figure(found: float, key: str) -> str:
    return units.cosine(found) if "cosine" in key else f"{found:.4g}"


def _outputs(verdict: Plain | None) -> Markup | None:
    if verdict is None or not verdict["outputs"]:
        return None
    heads = ("output", "mean cosine", "worst cosine", "worst sample", "R²", "SQNR",
             "largest difference", "argmax flips")  # fmt: skip
    rows = [
        tag(
            "tr",
            tag("th", tag("code", o["output"]), label, scope="row"),
            [tag("td", cell, class_="number") for cell in _output(o)],
        )
        for label, outputs in by_sums(verdict)
        for o in outputs
    ]
    head = [tag("th", h, scope="col", class_="number" if i else "") for i, h in enumerate(heads)]
    made = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows), class_="plain")
    return scrolling(made, "Closeness by output")


def by_sums(verdict: Plain) -> list[tuple[str, list[Plain]]]:
    """The outputs by both kinds of sums with their labels, if x86 without VNNI computes others."""
    both = verdict.get("by_sums", {})
    if len({repr(one["outputs"]) for one in both.values()}) < len(_LABELS):
        return [("", verdict["outputs"])]
    return [(label, both[kind]["outputs"]) for kind, label in _LABELS.items()]


def _output(row: Plain) -> list[str]:
    noise, flips, worst = row["sqnr_db"], row["flip_share"], row["worst_sample"]
    return [
        units.cosine(row["mean_cosine"]),
        units.cosine(row["worst_cosine"]),
        units.NONE if worst is None else f"#{worst}",
        _r2(row),
        "∞" if noise is None else f"{noise:.1f} dB",
        units.value(row["max_abs"]),
        units.NONE if flips is None else units.percent(flips),
    ]


def _r2(row: Plain) -> str:
    """R², with its columns; a report of an older version has none."""
    if row.get("r2") is None:
        return units.NONE
    columns = row["r2_columns"]
    return f"{row['r2']:.4f}" + ("" if columns is None else f" ({columns})")
