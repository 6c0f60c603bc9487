"""A hook of mkdocs: the page cli.md gets what --help says of each command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

PAGE = "cli.md"
_WIDTH = 88  # characters in a line, which a window on a desktop shows without scrolling


def sections(commands: click.Group) -> Iterator[str]:
    """Markdown for each command: its name as a heading, and its help as code."""
    whole = click.Context(commands, info_name="qcompile")
    for name in commands.list_commands(whole):
        command = commands.get_command(whole, name)
        assert command is not None
        context = click.Context(
            command, parent=whole, info_name=name, terminal_width=_WIDTH, max_content_width=_WIDTH
        )
        yield f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    if page.file.src_uri != PAGE:
        return markdown
    from qcompile.commands.cli import main

    return "\n".join((markdown, *sections(main)))
