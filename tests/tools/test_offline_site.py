"""The documentation's site loads nothing from a network, and the check sees where it would."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import offline_site


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ('<script src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"]),
        ("<link rel=stylesheet href='//fonts.example/a.css'>", ["//fonts.example/a.css"]),
        ('<img alt="a" src="http://example/a.png">', ["http://example/a.png"]),
        (
            '<link rel="preconnect" href="https://fonts.example" crossorigin>',
            ["https://fonts.example"],
        ),
        ("a { background: url( 'https://example/a.svg' ) }", ["https://example/a.svg"]),
        ('@import "https://example/a.css";', ["https://example/a.css"]),
        ('<a href="https://example/page">the page</a>', []),
        ('<link rel="canonical" href="https://example/page">', []),
        ('<script src="assets/x.js"></script><link href="assets/y.css">', []),
    ],
)
def test_what_a_page_loads(text: str, urls: list[str]) -> None:
    assert offline_site.loaded_urls(text) == urls


def test_a_fault_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "good.html").write_text('<a href="https://example/page">the page</a>')
    offline_site.on_post_build({"site_dir": str(tmp_path)})
    assert not caplog.records
    (tmp_path / "bad.css").write_text("@import url(https://example/a.css)")
    offline_site.on_post_build({"site_dir": str(tmp_path)})
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "bad.css loads https://example/a.css" in record.message
