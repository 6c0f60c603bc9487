"""The page of commands has the help of each."""

from __future__ import annotations

from types import SimpleNamespace

import click

from qcompile.commands.cli import main
from qcompile.commands.compile import compile as compile_command
from tools.command_help import PAGE, on_page_markdown


def page(name: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


def test_every_command_has_a_section_with_all_of_its_options() -> None:
    made = on_page_markdown("# Commands\n", page=page(PAGE), config={}, files=[])
    assert made.startswith("# Commands\n")
    for name in main.list_commands(click.Context(main)):
        assert f"\n## {name}\n" in made
        assert f"\nUsage: qcompile {name} " in made
    section = made.partition("\n## compile\n")[2].partition("\n## ")[0]
    for option in compile_command.params:
        assert max(option.opts, key=len) in section, option


def test_other_pages_stay_as_they_are() -> None:
    assert on_page_markdown("# Data\n", page=page("data.md"), config={}, files=[]) == "# Data\n"
