"""A picture of a report's page for the docs: selected sections, in a palette of few colours.

    qcompile demo --report report.html
    python -m tools.report_picture report.html docs/report.png

Needs chromium and Pillow.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_SECTION = re.compile(r'<section id="([^"]+)".*?</section>', re.DOTALL)


def shown(page: str, sections: set[str]) -> str:
    """The page with only these sections. Raises SystemExit where one is missing."""
    missing = sections - set(_SECTION.findall(page))
    if missing:
        sys.exit(f"the page has no section {', '.join(sorted(missing))}")
    return _SECTION.sub(lambda m: m[0] if m[1] in sections else "", page)


def photograph(page: Path, out: Path, width: int, height: int) -> None:
    """A PNG as chromium draws the page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *_FLAGS, f"--user-data-dir={profile}", f"--screenshot={out}"]
        command += [f"--window-size={width},{height}", page.resolve().as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    """Write the picture and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sections", default="summary,channels")
    parser.add_argument("--size", default="1000x1505", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--colours", type=int, default=256)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        part, raw = Path(folder) / "part.html", Path(folder) / "raw.png"
        part.write_text(shown(args.page.read_text(encoding="utf-8"), set(args.sections.split(","))))
        photograph(part, raw, width, height)
        with Image.open(raw) as drawn:
            drawn.convert("RGB").quantize(args.colours, dither=Image.Dither.NONE).save(
                args.out, optimize=True
            )
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
