"""``qcompile --help`` says what each command says of itself, without importing it."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from qcompile.commands._summaries import SUMMARIES
from qcompile.commands.cli import main
from tests.command_line import run

_LOADED = """
import sys
from qcompile.commands.cli import main
try:
    main(["--help"])
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""


def other_summaries(summaries: dict[str, str]) -> list[str]:
    """Commands whose line is not the first sentence of their own help."""
    ctx = click.Context(main)
    commands = {name: main.get_command(ctx, name) for name in main.list_commands(ctx)}
    own = {n: c.get_short_help_str(limit=200) for n, c in commands.items() if c is not None}
    return [name for name in own | summaries if own.get(name) != summaries.get(name)]


def test_each_command_has_its_own_sentence() -> None:
    assert other_summaries(SUMMARIES) == []


def test_another_sentence_is_seen() -> None:
    assert other_summaries({**SUMMARIES, "diff": "Other.", "gone": "Old."}) == ["diff", "gone"]


def test_help_shows_them() -> None:
    text = " ".join(run("--help").output.split())
    assert all(summary in text for summary in SUMMARIES.values())


@pytest.mark.parametrize("name", ["onnxruntime", "onnx", "numpy", "psutil", "archspec.cpu"])
def test_help_waits_for_no_import(name: str, loaded: list[str]) -> None:
    assert "click" in loaded and name not in loaded


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    """Modules that ``qcompile --help`` imports."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True
    )
    return done.stderr.split()
