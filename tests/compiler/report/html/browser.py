"""A real browser without a window: what it makes of a page, and what it complains about."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
_LIMIT = 120  # seconds, on a busy machine


@dataclass(frozen=True)
class Seen:
    """The document once scripts have run, lines of the console, and a picture where asked for."""

    document: str
    console: list[str]
    png: bytes = b""


def look(url: str, *flags: str, window: tuple[int, int] | None = None) -> Seen:
    """Open a page in a fresh profile; with ``window``, of so many pixels, also take a picture.

    Skips the test, with the reason, where there is no browser that runs.
    """
    reason = _obstacle()
    if reason is not None:
        pytest.skip(reason)
    seen, code = _open(url, flags, window)
    assert code == 0, seen.console
    return seen


def _open(url: str, flags: tuple[str, ...], window: tuple[int, int] | None) -> tuple[Seen, int]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        picture = Path(folder) / "page.png"
        command = [str(_found()), *_FLAGS, f"--user-data-dir={folder}/profile", *flags]
        if window is not None:
            command += ["--window-size={},{}".format(*window), f"--screenshot={picture}"]
        done = subprocess.run(
            [*command, "--dump-dom", url], capture_output=True, text=True, timeout=_LIMIT
        )
        png = picture.read_bytes() if picture.exists() else b""
    console = re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE)
    return Seen(done.stdout, console, png), done.returncode


def _found() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@functools.cache
def _obstacle() -> str | None:
    """Why no page can be looked at, None where one can."""
    if _found() is None:
        return f"no browser: none of {', '.join(_NAMES)}"
    _, code = _open("about:blank", (), None)
    # It reserves far more memory than it uses, which ulimit -v may forbid.
    return None if code == 0 else f"{_found()} does not run here: exit code {code}"
