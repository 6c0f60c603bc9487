"""The chart and the table of what --max-size chose."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from qcompile.compiler.report import html
from qcompile.compiler.report.html import bits
from qcompile.compiler.report.records import SizeAccount, SizePoint, WeightBits, WidthDrop
from tests.compiler.report.html.reports import HOSTILE, compiled

POINTS = [
    SizePoint(900, 0.95, 0.9, 0.5, passed=False, chosen=False),
    SizePoint(1000, 0.99, 0.97, 0.45, passed=True, chosen=True),
    SizePoint(2000, 0.999, 0.99, 0.6, passed=True, chosen=False),
]


def account(**changes: Any) -> dict[str, Any]:
    drops = [WidthDrop(8, 1e-5, 0.9999), WidthDrop(4, 2e-3, 0.99)]
    weights = [
        WeightBits("w", "ffn-out-weight", 0, 4, 512, drops),
        WeightBits("s", "other", None, 8, 9, []),
    ]
    found = SizeAccount(1050, 4, 2, weights, POINTS)
    return {"sizes": {**asdict(found), **changes}}


def places(page: str, what: str) -> list[float]:
    return [float(x) for x in re.findall(rf'<circle[^>]* {what}="([\d.]+)', page)]


def test_larger_is_to_the_right_and_closer_at_the_top() -> None:
    drawn = str(bits.chart(POINTS, 1050))
    across, down = places(drawn, "cx"), places(drawn, "cy")
    assert across == sorted(across) and len(set(across)) == 3
    assert down == sorted(down, reverse=True) and len(set(down)) == 3
    assert drawn.count("dot timed failed") == drawn.count("dot timed chosen") == 1


def test_latency_is_the_colour() -> None:
    drawn = str(bits.chart(POINTS, 1050))
    hues = [int(h) for h in re.findall(r"hsl\((\d+)", drawn)]
    assert hues[1] > hues[0] > hues[2]  # from orange, the slowest, to green
    untimed = [SizePoint(p.bytes, p.mean_cosine, None, None, True, False) for p in POINTS]
    assert "hsl" not in str(bits.chart(untimed, 1050)) and "not timed" in str(
        bits.chart(untimed, 1)
    )


def test_nothing_to_draw() -> None:
    assert bits.bits({}) is None and bits.bits({"sizes": {}}) is None
    unknown = [SizePoint(9, None, None, None, True, True)]
    assert bits.chart(unknown, 10) is None
    exact = [SizePoint(9, 1.0, 1.0, 1.0, True, True)]
    assert "circle" in str(bits.chart(exact, 9))


def test_it_is_a_section_of_the_page_and_names_are_escaped() -> None:
    report = compiled()
    assert 'id="bits"' not in html.page(report)
    found = account()
    found["sizes"]["weights"][0]["item"] = HOSTILE
    shown = html.page(report | found)
    assert 'id="bits"' in shown and "2.0e−3 at 4" in shown and "<img src=x" not in shown
