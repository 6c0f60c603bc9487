"""Progress: lines on stderr without a terminal, bars with counts on one, nothing with -q."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from qcompile.commands import _console
from qcompile.commands._console import progress_bar
from qcompile.compiler.progress import Bars
from tests.command_line import compile_args, run

LINE = re.compile(r" *\d+\.\d s  (.+)")


def test_each_stage_is_a_line_on_stderr(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data, "--recipe", "per-tensor"))
    lines = [LINE.fullmatch(line) for line in result.stderr.splitlines()]
    assert all(lines), result.stderr
    stages = [match[1].partition(" (")[0] for match in lines if match]
    assert stages[0] == "load" and stages[-1] == "done"
    assert {"calibrate", "verify"} <= {*stages}
    assert " s  " not in result.stdout


def test_quiet_writes_nothing(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data, "--recipe", "per-tensor", "-q"))
    assert result.output == ""


def test_json_has_its_progress_on_stderr(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data, "--recipe", "per-tensor", "--json"))
    assert result.stdout.startswith("{") and "calibrate" in result.stderr


def test_bars_show_counts_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    times = iter(range(1000))

    def console(**_: object) -> Console:
        return Console(
            file=written, force_terminal=True, width=120, get_time=lambda: float(next(times))
        )

    monkeypatch.setattr(_console, "Console", console)
    with progress_bar(shown=True) as bar:
        bar.step("unknown length")
        bar.step("verify", 4)
        bar.advance()
        bar.advance()
        assert isinstance(bar, Bars) and isinstance(bar._bars, Progress)
        bar._bars.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "2/4" in text and re.search(r"about \d+:\d\d left", text)
    assert not [line for line in text.splitlines() if "unknown length" in line and "/" in line]
