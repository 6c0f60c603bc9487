"""A hook of mkdocs: the built site must not load anything from a network.

Links may lead anywhere; scripts, styles, fonts, images and frames must be part of the site.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.plugins.offline_site")
_URL = r"""["']?\s*((?:https?:)?//[^"')\s>]+)"""
_LOADED = re.compile(
    rf"""<(?!a\b|link[^>]*\brel=["']?canonical)[a-z]+\b[^>]*?\s(?:src|href|srcset|data)\s*=\s*{_URL}
    | url\(\s*{_URL} | @import\s+{_URL}""",
    re.VERBOSE | re.IGNORECASE,
)


def loaded_urls(text: str) -> list[str]:
    """URLs on other hosts that a page or a style sheet loads."""
    return [next(filter(None, match.groups())) for match in _LOADED.finditer(text)]


def faults(site: Path) -> Iterator[str]:
    """One line for each file and URL."""
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            for url in loaded_urls(path.read_text(encoding="utf-8")):
                yield f"{path.relative_to(site)} loads {url}, and must work offline"


def on_post_build(config: Mapping[str, Any]) -> None:
    """Called by mkdocs; with --strict a warning fails the build."""
    for fault in faults(Path(config["site_dir"])):
        _LOG.warning(fault)
