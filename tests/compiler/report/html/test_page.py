"""The page holds what the report says, loads nothing, and stays whole where parts are missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from qcompile.compiler.report.html import page
from qcompile.compiler.report.html.markup import text
from tests.compiler.report.html.reports import (
    HOSTILE,
    compiled,
    hostile,
    ranking,
    searched,
    twelve_layers,
)

MEGABYTE = 1e6
_VOID = {"br", "input", "link", "meta"}


class Outline(HTMLParser):
    """Checks that tags close in order; collects ids, references and texts by tag."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.feed(source)
        self.close()
        self.faults += [f"<{t}> is never closed" for t in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.faults += [f"{k} on <{tag}>" for k, _ in attrs if k.startswith("on") or k == "style"]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> does not close what is open")

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def said(self, *tags: str) -> str:
        """All text, or that directly in these tags."""
        return " ".join(t for tag, t in self.texts if not tags or tag in tags)


def faults(source: str) -> list[str]:
    """What would make a page depend on something else, or a browser guess."""
    seen = Outline(source)
    found = list(seen.faults)
    found += [f"loads {r}" for r in seen.references if not r.startswith(("#", "data:,"))]
    found += [f"no target {r}" for r in seen.references if r[0] == "#" and r[1:] not in seen.ids]
    found += [f"id {i} twice" for i in set(seen.ids) if seen.ids.count(i) > 1]
    found += [f"<{t}>" for t in seen.tags & {"img", "iframe", "object", "embed", "base", "form"}]
    css = seen.said("style")
    return found + re.findall(r"@import|url\(|@font-face", css)


@pytest.mark.parametrize("make", [compiled, hostile, twelve_layers])
def test_the_page_needs_nothing_else_and_is_well_formed(make: Any) -> None:
    assert faults(page(make())) == []


@pytest.mark.parametrize(
    "fault",
    [
        '<img src="https://example.org/x.png">',
        '<a href="//example.org">x</a>',
        '<a href="#nowhere">x</a>',
        '<p onclick="x()">x</p>',
        '<p id="main">x</p>',
        "<p>x</b></p>",
        "<div>",
        "<style>@import 'x.css'</style>",
    ],
)
def test_the_check_sees_a_fault(fault: str) -> None:
    made = page(compiled()).replace("</main>", f"{fault}</main>")
    assert len(faults(made)) >= 1


def test_hostile_names_stay_text() -> None:
    seen = Outline(page(hostile()))
    assert "img" not in seen.tags
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert seen.said("h1") == shown and seen.said("code").count(shown) > 20


def test_the_headline_says_size_speed_and_closeness() -> None:
    report = compiled()
    report |= {"float_bytes": 90_400_000, "bytes": 23_900_000}
    report["bench"]["models"][1] |= {"ratio": 0.4, "ratio_low": 0.25, "ratio_high": 0.5}
    report["verify"]["outputs"][0]["mean_cosine"] = 0.9989
    seen = Outline(page(report)).said("p", "span", "text")
    for word in ("3.78× smaller", "90.4 MB", "23.9 MB", "2.50× faster", "2.00 to 4.00", "0.9989",
                 "all gates passed"):  # fmt: skip
        assert word in seen, word


def test_a_failed_gate_is_named_and_slower_is_called_slower() -> None:
    report = compiled()
    report["gates"]["max_latency_ratio"] = 1.0
    report["failures"] = ["compiled takes 2 times as long, over 1 (--max-latency-ratio)"]
    report["bench"]["models"][1] |= {"ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
    seen = Outline(page(report)).said()
    assert "1 gate failed" in seen and "2.00× slower" in seen
    assert "compiled takes 2 times as long" in seen and "failed" in seen


def test_gates_are_counted_and_not_messages() -> None:
    report = compiled()
    report["failures"] = [
        "output 'a': mean cosine 0.9 is below 0.98 (--min-cosine)",
        "output 'b': mean cosine 0.8 is below 0.98 (--min-cosine)",
        "the search reached this with 3 of 9 tensors lifted: lower the gate",
    ]
    assert "1 gate failed" in Outline(page(report)).said("span")


def test_within_the_noise_no_gate_has_failed() -> None:
    report = compiled()
    report["gates"]["max_latency_ratio"] = 1.0
    report["bench"]["models"][1] |= {"ratio": 1.01, "ratio_low": 0.9, "ratio_high": 1.1}
    assert "failed" not in Outline(page(report)).said("span")


def test_a_twelve_layer_page_is_under_three_megabytes() -> None:
    assert len(page(twelve_layers()).encode()) < 3 * MEGABYTE


def test_all_sections_are_there_and_linked() -> None:
    report = compiled()
    report["search"] = searched()
    made = page(report)
    for key in ("gates", "channels", "sensitivity", "bytes", "time", "float", "tensors", "passes",
                "refusals", "settings"):  # fmt: skip
        assert f'<section id="{key}"' in made and f'href="#{key}"' in made


def test_parts_that_a_report_lacks_are_left_out() -> None:
    report = compiled()
    for key in ("float_content", "profile", "channels"):  # as older reports are
        del report[key]
    report |= {"verify": None, "bench": None, "skips": [], "calibration": {}, "search": {}}
    made = page(report)
    assert faults(made) == []
    for key in ("channels", "sensitivity", "time"):
        assert f'id="{key}"' not in made
    assert "not verified" in made and "not timed" in made


def test_every_tensor_has_a_row_with_its_reason() -> None:
    report = compiled()
    made = page(report)
    table = made[made.index('<section id="tensors"') : made.index('<section id="passes"')]
    assert table.count("<tr>") == len(report["ledger"]) + 1
    for row in report["ledger"]:
        assert text(row["name"]) in table and text(row["reason"]) in table


def test_what_was_lifted_is_marked() -> None:
    report = compiled()
    report["search"] = searched()
    made = page(report)
    part = made[made.index('id="sensitivity"') : made.index('id="bytes"')]
    assert part.count('class="dot worst"') == 2  # the legend and the one that was lifted
    assert "2.0e−3" in part and "not measured" in part


@pytest.mark.parametrize("value", [{}, [], 3, None, {"ledger": []}, {"rows": 1}])
def test_what_is_no_report_is_an_error_of_type_or_key(value: Any) -> None:
    with pytest.raises((KeyError, TypeError, AttributeError)):
        page(value)


@pytest.mark.parametrize("name", ["h", HOSTILE])
def test_a_ranking_has_a_page_too(name: str) -> None:
    made = page(ranking(name))
    assert faults(made) == []
    seen = Outline(made).said()
    for word in ("0.9970", "2.0e−3", "1 item raised", "3.0e−3"):
        assert word in seen, word
    assert made.count('class="dot worst"') == 2  # the legend and the one that the policy lifts


def test_a_ranking_of_lifted_items_alone() -> None:
    report = ranking()
    report["policy"] = None
    for row in report["rows"]:
        row["alone"] = None
    seen = Outline(page(report)).said()
    assert "remains if only this item is float" in seen and "Most sensitive" not in seen


def test_requirements_of_the_target_are_counted() -> None:
    report = compiled()
    report["requirements"] = {"every node has a kernel": 1234}
    seen = Outline(page(report)).said("th", "td")
    assert "every node has a kernel" in seen and "1,234" in seen


def test_what_ran_away_from_its_target_says_so() -> None:
    report = compiled()
    report["away"] = "CPUExecutionProvider"
    assert "run on CPUExecutionProvider, not on the target" in page(report)
