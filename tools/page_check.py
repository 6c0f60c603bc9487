"""Checks that people can use pages of HTML: by screen reader, in the dark, on a phone, on paper.

    npm install --ignore-scripts --no-package-lock --prefix build/pages puppeteer-core axe-core
    python -m tools.page_check report.html site/ [--most-paper 9]

Opens each page (of a folder: every .html file) in chromium, in light and dark colours, 400 and 1280
pixels wide, with everything unfolded. Faults are violations of axe-core's rules (WCAG A and AA, and
best practices), a page that scrolls sideways, complaints on the console, and more than --most-paper
pages of A4 when printed. The exit code is 1 if there is a fault, 2 if something is not installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_suffix(".mjs")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MODULES = Path("build/pages/node_modules")
PACKAGES = ("puppeteer-core", "axe-core")
INSTALL = "npm install --ignore-scripts --no-package-lock --prefix"
SCHEMES = ("light", "dark")
WIDTHS = (400, 1280)  # pixels: a phone, a window on a desktop


class MissingError(Exception):
    """A program or a package is not installed."""


@dataclass(frozen=True)
class Tools:
    """What looks at pages: two programs, and a folder ``node_modules``."""

    node: str
    chromium: str
    modules: Path

    @classmethod
    def found(cls, node: str, chromium: str, modules: Path) -> Tools:
        """The tools by name, path, or as installed where empty. Raises MissingError."""
        for package in PACKAGES:
            if not (modules / package / "package.json").is_file():
                command = f"{INSTALL} {modules.parent} {' '.join(PACKAGES)}"
                raise MissingError(f"{package} is not in {modules}: {command}")
        return cls(
            _program(("node",), node, "--node"),
            _program(BROWSERS, chromium, "--chromium"),
            modules.resolve(),
        )


def _program(names: Sequence[str], given: str, option: str) -> str:
    found = next(filter(None, map(shutil.which, (given,) if given else names)), None)
    if found is None:
        raise MissingError(f"{given or names[0]} is not installed: {option} PATH names it")
    return found


@dataclass(frozen=True)
class Fault:
    """What is wrong with a page, in which view and at which element."""

    page: str
    what: str
    view: str = ""
    place: str = ""

    def __str__(self) -> str:
        view = f" ({self.view})" if self.view else ""
        return f"{self.page}{view}: {self.what}" + (f": {self.place}" if self.place else "")


def pages(paths: Sequence[Path]) -> list[Path]:
    """The pages that paths stand for, without a site's 404.html, which only a server can show.

    Raises MissingError where there are none.
    """
    found: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.html") if p.name != "404.html")
        if not all(page.is_file() for page in inside) or not inside:
            raise MissingError(f"{path}: no page")
        found += inside
    return found


def faults(paths: Sequence[Path], tools: Tools, most_paper: int | None = None) -> Iterator[Fault]:
    """All faults of each page and view.

    Raises subprocess.CalledProcessError where the browser fails.
    """
    for row in _rows(paths, tools, paper=most_paper is not None):
        if "paper" not in row:
            view = f"{row['scheme']}, {row['width']} pixels"
            yield from (Fault(row["page"], what, view, place) for what, place in row["faults"])
        elif most_paper is not None and row["paper"] > most_paper:
            what = f"{row['paper']} pages when printed; at most {most_paper} expected"
            yield Fault(row["page"], what)


def _rows(paths: Sequence[Path], tools: Tools, *, paper: bool) -> list[dict[str, Any]]:
    """What the script found, with each page as it was given."""
    urls = {path.resolve().as_uri(): str(path) for path in paths}
    job = {
        "urls": [*urls],
        "schemes": SCHEMES,
        "widths": WIDTHS,
        "paper": paper,
        "unfold": True,
        "chromium": tools.chromium,
        "modules": str(tools.modules),
    }
    done = subprocess.run(
        [tools.node, str(SCRIPT)], input=json.dumps(job), stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    return [{**row, "page": urls[row["url"]]} for row in json.loads(done.stdout)]


def in_short(found: Sequence[Fault]) -> Iterator[str]:
    """Equal faults of several pages and views on one line, with the first place of each."""
    for what in dict.fromkeys(fault.what for fault in found):
        first, *others = (fault for fault in found if fault.what == what)
        yield f"{first}" + (f" [and in {len(others)} other views]" if others else "")


def main() -> None:
    """Print faults, or that there are none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--most-paper", type=int, metavar="N", help="pages of A4 when printed")
    parser.add_argument("--node", default="", help="program; default: on PATH")
    parser.add_argument("--chromium", default="", help="program; default: on PATH")
    parser.add_argument("--modules", type=Path, default=MODULES, help=f"default: {MODULES}")
    args = parser.parse_args()
    try:
        tools = Tools.found(args.node, args.chromium, args.modules)
        paths = pages(args.pages)
    except MissingError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    found = list(faults(paths, tools, args.most_paper))
    for line in in_short(found):
        print(line)
    views = len(paths) * len(SCHEMES) * len(WIDTHS)
    print(f"{len(paths)} pages, {views} views: {len(found)} faults")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
