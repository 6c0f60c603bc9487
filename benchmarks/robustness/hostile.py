"""Runs qcompile on hostile files, and prints the outcome of each.

Every case runs in a separate process: it must end by itself, soon, in little memory, with a
one-line error or a correct result, and write nothing but its output.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.robustness import (
    _hostile_base,
    _hostile_data,
    _hostile_graphs,  # noqa: F401  # registers
    _hostile_models,  # noqa: F401
    _isolated_process,
)
from models._common import fail
from qcompile.commands.cli import main as qcompile
from qcompile.rewriting import registry

SECONDS = 20.0
MEMORY = 4 << 30  # limit of the address space
PEAK = 800e6  # limit of resident memory, of which Python and its libraries need 60 MB
COMMANDS = ("compile", "compile dynamic", "inspect")
# Commands to import before processes are forked, so that not each case imports them.
PRELOAD = ("compile", "inspect")


@dataclass(frozen=True)
class Row:
    """One case: how it ended, its error message, and what is wrong with that ("" for nothing)."""

    name: str
    command: str
    code: int | None
    seconds: float
    peak_mb: float
    said: str
    fault: str


def preload() -> None:
    """Import the modules that each case needs."""
    for name in PRELOAD:
        importlib.import_module(f"qcompile.commands.{name}")
    registry.passes()
    registry.calibrators()
    registry.target("cpu")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file, to see what was touched."""
    files = (p for p in folder.rglob("*") if p.name != "log")
    return {str(p): (s.st_size, s.st_mtime_ns) for p in files if (s := p.lstat())}


def judge(
    end: _isolated_process.Outcome,
    out: Path,
    before: dict[str, tuple[int, int]],
    peak: float = PEAK,
) -> str:
    """What is wrong with the outcome of a case, "" where nothing is."""
    lines = [x for x in end.output.splitlines() if x.startswith(("error:", "Error:"))]
    after = listing(out.parent)
    ours = {str(out), str(out.with_suffix(".report.json"))} if end.code == 0 else set()
    touched = sorted(n for n in after if after[n] != before.get(n) and n not in ours)
    checks = {
        "hung": end.hung,
        f"signal {end.signal}": end.crashed,
        f"exit code {end.code}": not end.hung and not end.signal and end.code not in (0, 1, 2),
        "traceback": "Traceback" in end.output,
        "internal error": "internal error" in end.output,
        "not one line of error": end.code in (1, 2) and len(lines) != 1,
        "controls the terminal": any(c in end.output for c in "\x1b\x9b\x07\u202e"),
        f"{end.memory / 1e6:.0f} MB": end.memory > peak,
        f"touched {', '.join(touched)}": bool(touched),
    }
    return "; ".join(what for what, wrong in checks.items() if wrong)


def cases(names: list[str]) -> list[tuple[str, str, Callable[[Path], list[str]]]]:
    """(name, command, builder of its arguments)."""
    found: list[tuple[str, str, Callable[[Path], list[str]]]] = []
    builders = _hostile_base.BUILDERS
    for name, build in builders.items():
        found.append((name, "compile", lambda f, b=build: [str(b(f)), *_numbers(f)]))  # type: ignore[misc]
        found.append((name, "compile dynamic", lambda f, b=build: [str(b(f)), "--mode", "dynamic"]))  # type: ignore[misc]
        found.append((name, "inspect", lambda f, b=build: [str(b(f)), "--all"]))  # type: ignore[misc]
    for name, options in _hostile_data.BUILDERS.items():
        found.append((name, "compile", options))
    unknown = set(names) - {name for name, _, _ in found}
    if unknown:
        fail(f"no case is called {sorted(unknown)[0]!r}")
    return [case for case in found if not names or case[0] in names]


def _numbers(folder: Path) -> list[str]:
    path = folder.parent / "x.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((8, 4), np.float32))
    return ["--data", str(path)]


def run(name: str, command: str, build: Callable[[Path], list[str]]) -> Row:
    """Build a case in a new folder and run it."""
    with tempfile.TemporaryDirectory() as home:
        folder, out = Path(home, "model"), Path(home, "out.onnx")
        folder.mkdir()
        Path(home, _hostile_base.SECRET).write_bytes(bytes(64))
        arguments = [command.split()[0], *build(folder)]
        if command != "inspect":
            arguments += ["-o", str(out), "--no-bench"]
        before = listing(Path(home))
        end = _isolated_process.run(
            lambda: qcompile(arguments, color=True), SECONDS, MEMORY, Path(home, "log")
        )
        fault = judge(end, out, before)
    errors = [x for x in end.output.splitlines() if x.startswith("error:")] or [""]
    return Row(name, command, end.code, round(end.seconds, 2), end.memory / 1e6, errors[0], fault)


def show(row: Row) -> None:
    """One line of the table."""
    result = row.said[:90] if row.code else "compiled" if row.command != "inspect" else "shown"
    figures = f"{row.seconds:5.1f} s {row.peak_mb:5.0f} MB  "
    print(f"{row.name:42} {row.command:16} {figures}{row.fault or result}", flush=True)


def main() -> None:
    """Run the cases of the command line; exit code 1 if one has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--command", choices=COMMANDS, help="default: all of them")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    preload()
    rows = []
    for case in cases(args.names):
        if args.command not in (None, case[1]):
            continue
        rows.append(run(*case))
        show(rows[-1])
    bad = [r for r in rows if r.fault]
    slowest, largest = max(r.seconds for r in rows), max(r.peak_mb for r in rows)
    print(f"{len(rows)} cases, {len(bad)} bad; slowest {slowest:.1f} s, peak {largest:.0f} MB")
    if args.json:
        values: list[dict[str, Any]] = [asdict(r) for r in rows]
        args.json.write_text(json.dumps(values, indent=1))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
