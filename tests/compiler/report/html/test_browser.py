"""The page in a real browser: no complaint, tables that work, pictures that are not empty."""

from __future__ import annotations

import html
import json
import re
import struct
import zlib
from pathlib import Path

from qcompile.compiler.report.html import page
from tests.compiler.report.html.browser import look
from tests.compiler.report.html.reports import compiled, hostile, searched

_READY = re.compile(r'<html[^>]* data-ready="yes"')


def written(folder: Path, source: str) -> str:
    """Where the page lies, as file://"""
    path = folder / "page with space.html"
    path.write_text(source, encoding="utf-8")
    return path.as_uri()


def with_script(source: str, script: str) -> str:
    """A page that also runs ``script`` once it is ready; its policy would not let it."""
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    bare, removed = re.subn(policy, "", source)
    assert removed == 1
    return bare.replace("</body>", f"<script>{script}</script></body>")


def full() -> str:
    report = compiled()
    report["search"] = searched()
    return page(report)


def test_hostile_names_do_nothing(tmp_path: Path) -> None:
    seen = look(written(tmp_path, page(hostile())))
    assert seen.console == []
    assert _READY.search(seen.document)
    assert "<title>owned" not in seen.document


def test_the_policy_stops_what_is_not_ours(tmp_path: Path) -> None:
    foreign = full().replace("</main>", "<script>document.title = 'owned'</script></main>")
    seen = look(written(tmp_path, foreign))
    assert "<title>owned" not in seen.document
    assert any("Content Security Policy" in line for line in seen.console)


_USE = """
const box = document.querySelector('[data-name="Tensors"]');
const rows = () => [...box.querySelectorAll('tbody tr')].filter((r) => !r.hidden);
const out = { paper: getComputedStyle(document.body).backgroundColor };
const search = box.querySelector('input');
const type = (text) => { search.value = text; search.dispatchEvent(new Event('input')); };
out.all = rows().length;
type('WH0 int8');
out.found = rows().map((r) => r.cells[0].textContent);
type('no such tensor');
out.none = [rows().length, box.querySelector('output').textContent];
type('');
const [kind] = box.querySelectorAll('select');
kind.value = '=weight';
kind.dispatchEvent(new Event('change'));
out.kinds = [...new Set(rows().map((r) => r.cells[1].textContent))];
kind.value = '';
kind.dispatchEvent(new Event('change'));
const heads = [...box.querySelectorAll('th')];
const number = (v) => v === undefined ? null : Number(v);
const numbers = (i) => rows().map((r) => number(r.cells[i].dataset.v));
heads[4].querySelector('button').click();
out.down = numbers(4);
heads[4].querySelector('button').click();
out.up = numbers(4);
out.sorted = heads.map((h) => h.getAttribute('aria-sort'));
heads[6].querySelector('button').click();
out.noise = numbers(6);
document.getElementById('theme').click();
out.theme = document.documentElement.dataset.theme;
window.dispatchEvent(new Event('beforeprint'));
out.folded = document.querySelectorAll('details:not([open])').length;
document.body.textContent = JSON.stringify(out);
"""


def test_tables_search_filter_and_sort(tmp_path: Path) -> None:
    seen = look(written(tmp_path, with_script(full(), _USE)))
    assert seen.console == []
    found = json.loads(html.unescape(re.sub(r"(?s).*<body>|</body>.*", "", seen.document)))
    assert found["all"] == len(compiled()["ledger"])
    assert len(found["found"]) == 1 and found["found"][0].startswith("wh0")
    assert found["none"] == [0, f"0 of {found['all']} rows"]
    assert found["kinds"] == ["weight"]
    assert found["down"] == sorted(found["down"], reverse=True)
    assert found["up"] == sorted(found["up"])
    assert found["sorted"].count("ascending") == 1
    measured = [v for v in found["noise"] if v is not None]
    assert measured == sorted(measured, reverse=True)
    assert found["noise"][: len(measured)] == measured  # what has no value comes last
    assert (found["paper"], found["theme"]) == ("rgb(255, 255, 255)", "dark")
    assert found["folded"] == 0


def test_the_page_is_dark_where_the_system_is(tmp_path: Path) -> None:
    colour = "document.body.textContent = getComputedStyle(document.body).backgroundColor"
    dark = "--blink-settings=preferredColorScheme=0"
    seen = look(written(tmp_path, with_script(full(), colour)), dark)
    assert "rgb(18, 22, 27)" in seen.document


def drawn_rows(png: bytes) -> int:
    """How many rows of pixels have something on them: even ones filter to a byte or two."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    assert (depth, interlaced) == (8, 0)
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(data)
    step = width * {2: 3, 6: 4}[colour] + 1
    assert len(raw) == height * step
    return sum(len(set(raw[i * step + 1 : (i + 1) * step])) > 4 for i in range(height))


def test_a_picture_of_the_page_is_full_and_the_console_empty(tmp_path: Path) -> None:
    seen = look(written(tmp_path, full()), window=(900, 1200))
    assert seen.console == []
    assert _READY.search(seen.document)
    assert drawn_rows(seen.png) > 400  # text, cards, charts


def test_a_picture_of_nothing_has_no_rows() -> None:
    header = struct.pack(">IIBBBBB", 3, 2, 8, 2, 0, 0, 0)
    blank = zlib.compress((b"\x00" + b"\xff" * 9) * 2)
    chunks = [(b"IHDR", header), (b"IDAT", blank), (b"IEND", b"")]
    made = b"".join(struct.pack(">I", len(d)) + n + d + bytes(4) for n, d in chunks)
    assert drawn_rows(b"\x89PNG\r\n\x1a\n" + made) == 0
