"""What a page of HTML lacks for screen readers and keyboards, and colours with too little contrast.

Static properties only, by WCAG 2.2: ``python -m tools.page_check`` asks axe-core in a browser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import product

_NAMES = ("aria-label", "aria-labelledby", "title")
_VOID = {"br", "input", "link", "meta", "wbr"}
_NEEDS_TEXT = {"a", "button", "h1", "h2", "h3", "h4", "summary", "th", "title"}
TEXT, GRAPHICS = 4.5, 3.0  # least contrast: criteria 1.4.3 and 1.4.11, level AA
_BACKGROUNDS = ("paper", "raised")
_DECORATION = {"line", "group", "paper"}  # lines and bands without a meaning of their own


class _Reader(HTMLParser):
    """Collects faults element by element."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self._level = 0
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._regions: list[str] = []
        self._titles: dict[str, str] = {}
        self.feed(source)
        self.close()
        names = [self._titles.get(name, name) for name in self._regions]
        twice = {name for name in names if names.count(name) > 1}
        self.faults += [f"several regions are called {name!r}" for name in sorted(twice)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        named = any(given.get(name) for name in _NAMES)
        if tag == "html" and not given.get("lang"):
            self.faults.append("<html> has no language")
        if tag == "th" and given.get("scope") not in ("row", "col"):
            self.faults.append("<th> has no scope")
        described = given.get("aria-hidden") == "true" or (given.get("role") == "img" and named)
        if tag == "svg" and not described:
            self.faults.append("<svg> has neither role and label nor aria-hidden")
        if tag in ("input", "select", "nav") and not named:
            self.faults.append(f"<{tag}> has no label")
        if "tabindex" in given and not (given.get("role") and named):
            self.faults.append(f"<{tag}> can be focused, and has no role and label")
        if tag == "section" or given.get("role") == "region":
            self._regions.append(given.get("aria-labelledby") or given.get("aria-label") or "")
        if re.fullmatch("h[1-6]", tag):
            self._heading(int(tag[1]))
        if tag not in _VOID:
            self._open.append((tag, given))
            self._texts.append("")

    def _heading(self, level: int) -> None:
        if level > self._level + 1:
            self.faults.append(f"<h{level}> follows <h{self._level}>")
        self._level = level

    def handle_endtag(self, tag: str) -> None:
        opened, given = self._open.pop()
        text = self._texts.pop().strip()
        if opened in _NEEDS_TEXT and not text and not any(given.get(n) for n in _NAMES):
            self.faults.append(f"<{opened}> is empty")
        if given.get("id"):
            self._titles[given["id"] or ""] = text

    def handle_data(self, data: str) -> None:
        self._texts = [text + data for text in self._texts]


def faults(page: str) -> list[str]:
    """One line for each fault of the elements."""
    return _Reader(page).faults


def low_contrasts(css: str) -> Iterator[str]:
    """One line for each rule and palette in which text or a graphic hardly differs from the paper.

    Colours are custom properties. A rule without a background may stand on each of the paper's two
    shades. Graphics are fills and strokes.
    """
    for number, palette in enumerate(_palettes(css)):
        for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
            given = dict(re.findall(r"([\w-]+):\s*var\(--([\w-]+)\)", body))
            for part, least in (("color", TEXT), ("fill", GRAPHICS), ("stroke", GRAPHICS)):
                if part not in given or (part != "color" and given[part] in _DECORATION):
                    continue
                behind = [given["background"]] if "background" in given else _BACKGROUNDS
                for front, back in product([given[part]], behind):
                    found = contrast(palette[front], palette[back])
                    if found < least:
                        where = f"palette {number}: {selector.strip()}"
                        yield f"{where}: {front} on {back}: {found:.2f}, expected {least}"


def _palettes(css: str) -> list[dict[str, str]]:
    """Each block of colours, light or dark, filled up from the first."""
    blocks = re.findall(r"\{([^{}]*--paper:[^{}]*)\}", css)
    colours = [dict(re.findall(r"--([\w-]+):\s*(#\w+)", block)) for block in blocks]
    return [{**colours[0], **found} for found in colours]


def contrast(front: str, back: str) -> float:
    """The ratio of the luminances of two colours, #rgb or #rrggbb (WCAG 2.2, contrast ratio)."""
    low, high = sorted((_luminance(front), _luminance(back)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it, 0 to 1."""
    digits = colour.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    shares = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
