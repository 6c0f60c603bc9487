"""A report as one self-contained HTML file: no network, no library, no other file.

``Report.to_dict()`` is the only source. Text is escaped by construction (markup.py); a content
security policy allows only the page's own style and script, identified by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

from qcompile import __version__
from qcompile.compiler.report.html import (
    bits,
    channels,
    content,
    gates,
    sensitivity,
    training,
    work,
)
from qcompile.compiler.report.html.headline import headline
from qcompile.compiler.report.html.markup import Markup, join, tag, text

Plain: TypeAlias = dict[str, Any]
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class _Section:
    """``link``: its name in the navigation bar at the top."""

    key: str
    link: str
    title: str
    parts: Sequence[Markup | None]


def page(report: Plain) -> str:
    """The page of a report of ``compile`` or ``sensitivity``.

    Raises KeyError, TypeError or the like if it is neither.
    """
    return _of_ranking(report) if "rows" in report else _of_compilation(report)


def _of_ranking(report: Plain) -> str:
    recipe = work.facts([("Recipe", report["recipe"]), *work.workers(report)])
    sections = [
        _Section("sensitivity", "Sensitivity", "Sensitivity", [sensitivity.ranked(report)]),
        _Section("bits", "Bits", "Weights at fewer bits", [sensitivity.widths(report)]),
        _Section("items", "Items", "All measurements", [sensitivity.measurements(report)]),
        _Section("settings", "Settings", "Settings", [recipe]),
    ]
    title = f"{report['source']}: qcompile sensitivity"
    return _document(title, sensitivity.summary(report), sections)


def _of_compilation(report: Plain) -> str:
    sections = [
        _Section("gates", "Gates", "Gates", [gates.gates(report)]),
        _Section("training", "Training", "Training", [training.training(report)]),
        _Section("channels", "Channels", "Channels and outliers", [channels.channels(report)]),
        _Section("sensitivity", "Sensitivity", "Sensitivity", [sensitivity.of_search(report)]),
        _Section("bits", "Bits", "Bits of each weight", [bits.bits(report)]),
        _Section("bytes", "Bytes", "Where the bytes go", [content.bytes_by_kind(report)]),
        _Section(
            "time", "Time", "Where the time goes", [work.latency(report), work.operators(report)]
        ),
        _Section("float", "Float", "What stayed float, and why", [content.kept_float(report)]),
        _Section("tensors", "Tensors", "Every tensor", [content.tensors(report)]),
        _Section("passes", "Passes", "What the passes did", [work.passes(report)]),
        _Section("refusals", "Refusals", "What passes left unchanged", [work.refusals(report)]),
        _Section("settings", "Settings", "Settings and versions", [work.settings(report)]),
    ]
    return _document(f"{report['source']}: qcompile report", headline(report), sections)


def _document(title: str, top: Markup, sections: Sequence[_Section]) -> str:
    shown = [s for s in sections if any(s.parts)]
    links = [tag("a", "Summary", href="#summary")]
    links += [tag("a", s.link, href=f"#{s.key}") for s in shown]
    body = [
        tag(
            "section",
            tag("h2", s.title, id=f"{s.key}-title"),
            s.parts,
            id=s.key,
            aria_labelledby=f"{s.key}-title",
        )
        for s in shown
    ]
    style, script = (_read(name) for name in ("page.css", "page.js"))
    return Template(_read("page.html")).substitute(
        title=text(title),
        version=text(__version__),
        links=join(links),
        body=join([top, *body]),
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """The hash of a text, as a content security policy writes it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
