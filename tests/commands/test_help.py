"""--help: options by topic, and nothing cut off at 80 columns."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from qcompile.commands._help import TOPICS, GroupedCommand
from qcompile.commands.cli import main

COMMANDS = main.list_commands(click.Context(main))


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments, "--help"], terminal_width=80)
    assert result.exit_code == 0
    return result.output


def test_summaries_are_whole() -> None:
    text = shown()
    assert "..." not in text.split("Commands:")[1]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_longer_than_a_terminal(name: str) -> None:
    lines = [line for line in shown(name).splitlines() if "[" not in line]  # lists of choices
    assert max(map(len, lines)) <= 80


def test_options_are_listed_once_under_their_topic() -> None:
    text = shown("compile")
    headings = [line[:-1] for line in text.splitlines() if line[:1].isalpha() and line[-1:] == ":"]
    assert headings == [t for t in TOPICS if t not in ("Training", "Timing")]
    assert text.count("\n  --min-cosine ") == 1
    assert text.index("Gates (") < text.index("--min-cosine ") < text.index("Search and tuning")


@pytest.mark.parametrize("name", ["compile", "train", "verify", "bench", "sensitivity"])
def test_every_option_of_a_long_list_has_a_topic(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert isinstance(command, GroupedCommand)
    assert "\nOptions:" not in shown(name)
    command.params.append(click.Option(["--new-option"], help="Forgotten in the table."))
    try:
        assert "\nOptions:\n  --new-option" in shown(name)
    finally:
        command.params.pop()


def test_few_options_have_no_topics() -> None:
    few = GroupedCommand("few", params=[click.Option(["--data"]), click.Option(["--seed"])])
    text = few.get_help(click.Context(few))
    assert "\nOptions:\n  --data" in text and "Data:" not in text
