"""The command line as tests run it: within this process, and modules as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from qcompile.commands.cli import main
from tests.newer_runtime import skip_after

ROOT = Path(__file__).parents[1]


def run(*args: object) -> Result:
    """``qcompile ARGS``."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    skip_after(result.exception)
    return result


def compile_args(model: Path, data: Path, *more: object) -> tuple[object, ...]:
    """``compile`` to out.onnx next to the model, untimed."""
    out = model.with_name("out.onnx")
    return ("compile", model, "-o", out, "--data", data, "--no-bench", *more)


def run_module(name: str, *args: object, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    """``python -m NAME ARGS`` with modules from ``path``; the caller looks at the exit code."""
    command = [sys.executable, "-m", name, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def assert_one_line(result: Result, code: int, *words: str) -> None:
    """The documented exit code, and one line on stderr that says these words."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    lines = [x for x in result.stderr.splitlines() if x.startswith(("error:", "Error:"))]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
