"""Compiles every model of a folder and reports the outcome of each: the robustness benchmark.

    python -m benchmarks.robustness.battery FOLDER [--form static,qdq]
        [--match GLOB] [--part 1/4] [--json FILE] [--workers N | --cluster ADDRESS]

FOLDER: any tree of .onnx files. An ``index.jsonl`` in it (one line per file, with ``file`` and
``runs``) lists the files to use; without one, all are used. ``python -m
models.random_architectures FOLDER`` writes one of small transformers models. Each model is compiled
in a separate process by the command line, on random inputs, in these forms: static, dynamic,
weight-only and float for target cpu, also without data where that needs none, and the same for
qdq. What is written must run at several sizes of the open dimensions. Workers of a cluster, which
see the same folder and run from the same checkout, take a model and form each. Exit code 1 if any
is wrong, broken, crashed or hung.

| verdict | meaning |
|---|---|
| ok | written, runs, and passes its gate on inputs that the compiler did not see |
| unchanged | nothing could be quantized, the report has the reason; runs, outputs are as before |
| refused | exit code 2 with a one-line reason, nothing written |
| gate | exit code 1: an accuracy gate failed, nothing written |
| wrong | the file has other outputs; or a file was written in spite of an error |
| broken | the file does not run, at some size at which the float model runs |
| crashed | killed by a signal, a traceback, an internal error |
| hung | over the time limit |
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.robustness._battery_case import FORMS, Limits, Outcome, outcome, runtime_version
from models._common import fail
from qcompile.compiler.cluster.connect import connected, workers_of
from qcompile.compiler.cluster.workers import Kit, Site, Task

VERDICTS = ("ok", "unchanged", "refused", "gate", "wrong", "broken", "crashed", "hung")
FAULTS = ("wrong", "broken", "crashed", "hung")


def listed(folder: Path, match: str, part: str) -> list[tuple[str, bool | None]]:
    """Files by path within the folder, and whether the index says that they run."""
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        fail(f"--part {part!r}, expected NUMBER/COUNT such as 1/4")
    kept = [f for f in _files(folder) if fnmatch.fnmatch(f[0], match)]
    if not kept:
        fail(f"no model of {folder} matches {match!r}")
    return kept[int(number) - 1 :: int(count)]


def _files(folder: Path) -> list[tuple[str, bool | None]]:
    index = folder / "index.jsonl"
    if not folder.is_dir():
        fail(f"{folder} is no folder")
    if not index.is_file():
        paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.onnx"))
        return [(path, None) for path in paths]
    lines = [line for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        rows = [json.loads(line) for line in lines]
        return [(str(row["file"]), bool(row["runs"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{index} is no index, expected lines with file and runs: {error}")


def show(console: Console, found: Sequence[Outcome]) -> None:
    """One row per form over the files that run."""
    title = f"Files that run in ONNX Runtime {runtime_version()}"
    table = Table("form", "files", *VERDICTS, "good", title=title)
    for form in dict.fromkeys(o.form for o in found):
        own = [o for o in found if o.form == form and o.runs]
        counts = Counter(o.verdict for o in own)
        good = (counts["ok"] + counts["unchanged"]) / max(len(own), 1)
        cells = [str(counts[v]) for v in VERDICTS]
        table.add_row(form, str(len(own)), *cells, f"{good:.1%}")
    console.print(table)
    rest = Counter(o.verdict for o in found if not o.runs)
    if rest:
        counted = ", ".join(f"{n} {v}" for v, n in sorted(rest.items()))
        console.print(f"files that do not run there, in all forms: {counted}")


def show_if_bad(console: Console, item: Outcome) -> None:
    """A line for a fault, and for a file that runs but was not compiled."""
    if item.verdict in FAULTS or (item.runs and item.verdict in ("refused", "gate")):
        console.print(f"{item.verdict} {item.form} {escape(item.file)}: {escape(item.detail)}")


@dataclass(frozen=True)
class BatteryTask(Task[tuple[str, str], Outcome]):
    """A file and a form each."""

    folder: Path
    limits: Limits

    def here(self, item: tuple[str, str]) -> Outcome:
        """Compile in a process of its own."""
        file, form = item
        return outcome(self.folder / file, form, self.limits, file)

    def kit(self) -> Kit:
        """Nothing: the folder is on shared storage."""
        return Kit({}, self._open)

    def label(self, item: tuple[str, str]) -> str:
        """The file and the form."""
        return " ".join(item)

    def _open(self, _site: Site) -> Callable[[tuple[str, str]], Outcome]:
        return self.here


def main() -> None:
    """Print the table, or write JSON; exit code 1 where there is a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", default=",".join(FORMS), help="comma-separated, all by default")
    parser.add_argument("--match", default="*", help="glob over paths within the folder")
    parser.add_argument("--part", default="1/1", help="the n-th of so many parts, such as 2/4")
    parser.add_argument("--seconds", type=float, default=Limits.seconds)
    parser.add_argument("--memory", type=float, default=Limits.memory >> 30, help="GiB")
    parser.add_argument("--json", type=Path, help="file to write every outcome to")
    parser.add_argument("--workers", type=int, help="processes on this machine")
    parser.add_argument("--cluster", help="address of a Dask cluster")
    args = parser.parse_args()
    forms = args.form.split(",")
    unknown = [f for f in forms if f not in FORMS]
    if unknown:
        fail(f"unknown form {unknown[0]!r}, expected of: {', '.join(FORMS)}")
    limits = Limits(args.seconds, int(args.memory * (1 << 30)))
    found: list[Outcome] = []
    console = Console(width=150, soft_wrap=True)
    files = listed(args.folder, args.match, args.part)
    cases = [(file, form, runs) for file, runs in files for form in forms]
    with connected(args.workers, args.cluster) as client:
        task = BatteryTask(args.folder.resolve(), limits)
        made = workers_of(client).map(task, [(file, form) for file, form, _ in cases])
        for (_, _, runs), item in zip(cases, made, strict=True):
            found.append(item if runs is None else _by_index(item, runs))
            show_if_bad(console, found[-1])
    if args.json is not None:
        args.json.write_text(json.dumps(_plain(found), indent=1) + "\n")
    show(console, found)
    sys.exit(1 if any(o.verdict in FAULTS for o in found) else 0)


def _by_index(item: Outcome, runs: bool) -> Outcome:
    """The outcome with the index's ``runs``: random inputs may not suit a model that runs."""
    return Outcome(item.file, item.form, item.verdict, item.detail, runs)


def _plain(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [asdict(o) for o in found]


if __name__ == "__main__":
    main()
