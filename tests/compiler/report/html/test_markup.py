"""Text never becomes markup, whatever it holds."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.compiler.report.html.markup import Markup, join, tag, text


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.said = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.said += data


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"])))
def test_text_and_attributes_come_back_as_they_were(value: str) -> None:
    seen = Reader(tag("p", value, title=value))
    assert (seen.tags, seen.said, seen.attributes) == (["p"], value, [("title", value)])


@pytest.mark.parametrize("letter", ["\x00", "\x1b", "\x7f", "\ud800", "\uffff"])
def test_what_no_document_may_hold_is_replaced(letter: str) -> None:
    made = tag("p", f"a{letter}b")
    assert made == "<p>a\ufffdb</p>"
    made.encode()


def test_attributes() -> None:
    made = tag("input", class_="a", data_kind="b", hidden=True, value=None, open=False, width=0)
    assert made == '<input class="a" data-kind="b" hidden width="0">'


def test_children_nest_and_none_is_nothing() -> None:
    assert join(["<", None, [tag("b", 1), (2.5,)]]) == "&lt;<b>1</b>2.5"
    assert isinstance(text("<"), Markup) and text(text("<")) == "&amp;lt;"
