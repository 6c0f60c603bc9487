"""The page can be read by screen readers and in both palettes, and says what to do after a gate."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest

from qcompile.compiler.report.html import page
from qcompile.runtime.notebook_table import html_table
from tests.compiler.report.html.accessibility import contrast, faults, low_contrasts
from tests.compiler.report.html.reports import compiled, hostile, ranking, searched

CSS = resources.files("qcompile.compiler.report.html").joinpath("page.css").read_text("utf-8")


def full() -> dict[str, Any]:
    return compiled() | {"search": searched(), "failures": ["x is below 1 (--min-cosine)"]}


@pytest.mark.parametrize("make", [full, hostile, ranking])
def test_pages_have_no_fault(make: Any) -> None:
    assert faults(page(make())) == []


def test_tables_in_notebooks_have_none() -> None:
    assert faults(html_table("title", ("figure", "a"), [("x", "1")])) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('<html lang="en">', "<html>", "no language"),
        ('<th scope="col"', "<th", "no scope"),
        ("<h2>", "<h3>", "<h3> follows <h1>"),
        ('role="img"', "", "<svg> has neither"),
        ("Table: ", "", "several regions are called 'Gates'"),
        ('<nav aria-label="Sections">', "<nav>", "<nav> has no label"),
        ('role="region"', "", "can be focused"),
        (">result</th>", "></th>", "<th> is empty"),
        ("</main>", "<input></main>", "<input> has no label"),
    ],
)
def test_the_check_sees_a_fault(old: str, new: str, fault: str) -> None:
    made = page(full())
    assert old in made
    assert any(fault in found for found in faults(made.replace(old, new)))


def test_colours_differ_enough_from_the_paper() -> None:
    assert list(low_contrasts(CSS)) == []


def test_black_on_white_has_the_largest_contrast() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize(
    ("old", "new"), [("--soft: #56616e", "--soft: #888"), ("--soft: #9fabb8", "--soft: #555")]
)
def test_the_check_sees_a_pale_colour(old: str, new: str) -> None:
    assert old in CSS
    assert any("soft on paper" in found for found in low_contrasts(CSS.replace(old, new)))


def test_next_steps_follow_the_failures() -> None:
    report = full() | {"next_steps": ["--min-cosine 0.99: accepts <b> as measured", "no option"]}
    made = page(report)
    assert "<li><code>--min-cosine 0.99</code>: accepts &lt;b&gt; as measured</li>" in made
    assert made.index(">Failed<") < made.index(">What may help<") < made.index("no option")


def test_a_report_without_next_steps_has_no_such_box() -> None:
    report = compiled()
    assert report.pop("next_steps") == []
    assert "What may help" not in page(report)
