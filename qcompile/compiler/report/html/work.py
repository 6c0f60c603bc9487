"""Where the models spend their time, and what the compiler did: passes, refusals and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from qcompile.compiler.report.html import units
from qcompile.compiler.report.html.charts import Scale, axis, bar, swatch
from qcompile.compiler.report.html.markup import Child, Markup, join, tag
from qcompile.compiler.report.html.tables import Cell, Column, plain, table
from qcompile.planning import Skip
from qcompile.rewriting.instruments import PassRecord
from qcompile.runtime.profiler import OpTime, Profile
from qcompile.system.json_values import from_json

Plain: TypeAlias = dict[str, Any]
_SHOWN_OPS = 12


# ---- time


def latency(report: Plain) -> Markup | None:
    """Latency quantiles of both models; None if nothing was timed."""
    bench = report["bench"]
    if bench is None:
        return None
    keys = ("best_ms", "median_ms", "p90_ms")
    rows = [
        [m["model"], *(units.milliseconds(m[k]) for k in keys), f"{m['runs']:,}"]
        for m in bench["models"]
    ]
    shapes = ", ".join(f"{n} {units.shape(s)}" for n, s in bench["shapes"].items())
    text = (
        f"{shapes}; {units.count(bench['threads'], 'thread')}, {bench['rounds']} rounds in which "
        "the models take turns."
    )
    noisy = tag("p", "The machine was noisy: rounds of one model differ by more than 25 %.")
    return join(
        [
            tag("p", text, class_="lead"),
            plain(("model", "best", "median", "90th percentile", "runs"), rows, "Latency"),
            noisy if bench["noisy"] else None,
            *(tag("p", _session(*given)) for given in bench["session_options"].items()),
        ]
    )


def _session(model: str, entries: dict[str, str]) -> str:
    given = ", ".join(f"{key}={value}" for key, value in entries.items())
    return f"Session of {model}: {given}, for exact integer sums on this processor."


def operators(report: Plain) -> Markup | None:
    """Two bars per operator, float and compiled, the slowest first; None without a profile."""
    profiles: list[Profile] = from_json(list[Profile], report.get("profile", []))
    if len(profiles) < 2:
        return None
    old, new = ({o.op: o for o in p.ops} for p in profiles[:2])
    most = {op: max(_ms(old, op), _ms(new, op)) for op in old.keys() | new.keys()}
    order = sorted(most, key=lambda op: (-most[op], op))
    shown, rest = order[:_SHOWN_OPS], order[_SHOWN_OPS:]
    scale = Scale(0, most[order[0]] if order else 1)
    rows = [_operator(op, old.get(op), new.get(op), scale) for op in shown]
    if rest:
        rows.append(_operator(f"{len(rest)} others", _sum(old, rest), _sum(new, rest), scale))
    foot = tag(
        "li", tag("span"), axis(scale, lambda v: f"{v:g}", "milliseconds per run"), tag("span")
    )
    legend = tag(
        "ul",
        tag("li", swatch("float"), f" float, {units.milliseconds(profiles[0].total)}"),
        tag("li", swatch("compiled"), f" compiled, {units.milliseconds(profiles[1].total)}"),
        class_="legend",
    )
    text = (
        "Measured by ONNX Runtime's profiler, which adds time to every node: compare shares rather "
        "than sums. The number of nodes is in parentheses."
    )
    return join([tag("p", text, class_="lead"), legend, tag("ul", rows, foot, class_="operators")])


def _ms(found: dict[str, OpTime], op: str) -> float:
    return found[op].ms if op in found else 0.0


def _sum(found: dict[str, OpTime], ops: Sequence[str]) -> OpTime:
    mine = [found[op] for op in ops if op in found]
    return OpTime("", sum(o.nodes for o in mine), sum(o.ms for o in mine))


def _operator(op: str, old: OpTime | None, new: OpTime | None, scale: Scale) -> Markup:
    bars, figures = [], []
    for found, kind in ((old, "float"), (new, "compiled")):
        shown = units.NONE if found is None else f"{units.milliseconds(found.ms)} ({found.nodes})"
        length = 0.0 if found is None else scale(found.ms)
        bars.append(bar(length, kind, f"{op}, {kind}: {shown}", height=9))
        figures.append(tag("span", shown))
    return tag(
        "li",
        tag("span", op, class_="label"),
        tag("div", bars, class_="bars"),
        tag("div", figures, class_="number"),
    )


# ---- passes


def passes(report: Plain) -> Markup:
    """Seconds by stage, then each pass with what it did to the graph."""
    records: list[PassRecord] = from_json(list[PassRecord], report["passes"])
    most = max((p.seconds for p in records), default=0.0)
    rows = [_pass(i, p, most) for i, p in enumerate(records, 1)]
    columns = [
        Column("order", "number"),
        Column("pass"),
        Column("changed the graph", choice=True),
        Column("time", "number"),
        Column("of the slowest", "number"),
        Column("nodes before", "number"),
        Column("after", "number"),
        Column("refusals", "number"),
    ]
    return join([_stages(report["seconds"]), table(columns, rows, "Passes")])


def _pass(number: int, done: PassRecord, most: float) -> list[Cell]:
    share = 100 * done.seconds / most if most else 0.0
    took = units.duration(done.seconds)
    return [
        Cell(number, number),
        Cell(tag("code", done.name)),
        Cell("yes" if done.changed else "no"),
        Cell(took, done.seconds),
        Cell(bar(share, "compiled", took, height=9), done.seconds),
        Cell(done.nodes_before, done.nodes_before),
        Cell(done.nodes_after, done.nodes_after),
        Cell(done.skips or units.NONE, done.skips),
    ]


def _stages(seconds: dict[str, float]) -> Markup | None:
    if not seconds:
        return None
    most = max(seconds.values()) or 1.0
    rows = [
        tag(
            "li",
            tag("span", name, class_="label"),
            bar(100 * took / most, "compiled", f"{name}: {units.duration(took)}"),
            tag("span", units.duration(took), class_="number"),
        )
        for name, took in seconds.items()
    ]
    return tag("ul", rows, class_="stages")


def refusals(report: Plain) -> Markup:
    """Nodes that passes left unchanged, with the reasons."""
    if not report["skips"]:
        return tag("p", "None: every pass could handle every node that it considered.")
    columns = [Column("pass", choice=True), Column("node or tensor"), Column("reason")]
    rows = [
        [Cell(s.pass_name), Cell(tag("code", s.node), s.node), Cell(s.reason)]
        for s in from_json(list[Skip], report["skips"])
    ]
    return table(columns, rows, "Refusals")


# ---- settings


def settings(report: Plain) -> Markup:
    """Versions, recipe, calibration, digests and the pipeline, to reproduce the build."""
    machine = {
        "qcompile": report["qcompile"],
        **{k: v for k, v in report["environment"].items() if k != "isa"},
        "instruction sets": ", ".join(report["environment"]["isa"]) or "unknown",
    }
    identity = {
        "model, SHA-256": report["model_sha256"] or units.NONE,
        "recipe digest": report["recipe_digest"],
    }
    parts = [
        ("Versions", machine),
        ("Recipe", report["recipe"]),
        ("Calibration", report["calibration"] or {"data": "none was used"}),
        *workers(report),
        ("Operators that ONNX Runtime runs", report["operators"]),
        ("Identity", identity),
    ]
    pipeline = [tag("li", tag("code", p)) for p in _passes(report["pipeline"])]
    return join(
        [
            facts(parts),
            tag("details", tag("summary", "Pipeline"), tag("ol", pipeline, class_="names")),
        ]
    )


def workers(report: Plain) -> list[tuple[str, dict[str, Any]]]:
    """What the workers of a cluster did; empty without one."""
    return [("Workers", report["cluster"])] if report.get("cluster") else []


def facts(parts: Sequence[tuple[str, dict[str, Any]]]) -> Markup:
    """Lists of names and values, side by side."""
    lists = [tag("div", tag("h3", title), _list(known)) for title, known in parts]
    return tag("div", lists, class_="settings")


def _passes(pipeline: str) -> list[str]:
    """Split at commas that are not inside a pass's options."""
    found, depth = [""], 0
    for letter in pipeline:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def _list(known: dict[str, Any]) -> Markup:
    made: list[Child] = []
    for name, value in known.items():
        made += [tag("dt", name.replace("_", " ")), tag("dd", _spelled(value))]
    return tag("dl", made)


def _spelled(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(": ".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return str(value)
