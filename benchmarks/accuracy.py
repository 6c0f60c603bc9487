"""What quantization costs in accuracy: every recipe, every technique, every peer, in one table.

    python -m benchmarks.accuracy MODEL.onnx --data dev.jsonl --calibration train.jsonl \\
        --tokenizer DIR [--rows cpu,qdq,ablation,peers] [--tasks TASKDIR ... --task-data FOLDER]

MODEL is a sentence encoder. Each row of _accuracy_rows.py and each installed peer of
_peer_quantizers.py compiles it, calibrated on the first sentences of --calibration; Spearman and
the cosine to the float model's embeddings are those of embedding_closeness.py on --data. A row that
fails says why. With --tasks the table of benchmarks/task_accuracy.py follows.

Compiled files and their figures are kept in --work: an interrupted run continues, and a file is
compiled again only where model, data, settings or qcompile have changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

import qcompile
from benchmarks import task_accuracy
from benchmarks._accuracy_rows import GROUPS, ROWS, Row, groups_of, missing_passes, recipe_of
from benchmarks._accuracy_run import Bench, Figures, digest, file_digest, write_calibration
from benchmarks._integer_operators import integer_operators
from benchmarks._peer_quantizers import PEERS, Peer
from models._common import fail, make_folder
from qcompile import Options, QCompileError, compile
from qcompile.runtime import kernels

COLUMNS = "| model | what is int8 | Spearman | cosine mean | cosine worst | MB | seconds | CPU s |"
FLOAT = "fp32"
TASK_RECIPES = ("default", "per-tensor")
Build = Callable[[Path], None]


@dataclass(frozen=True)
class Cost:
    """Of compiling a file: wall time, and CPU time of all cores, which other load affects less."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Line:
    """A line of the table; ``failure`` where there are no figures."""

    group: str
    model: str
    what: str = "-"
    figures: Figures | None = None
    cost: Cost | None = None
    failure: str = ""


@dataclass(frozen=True)
class Candidate:
    """A model to compile. ``identity``: everything that determines the file."""

    group: str
    name: str
    identity: Mapping[str, Any]
    build: Build
    obstacle: str = ""

    def file(self, work: Path) -> Path:
        """Where its model is kept."""
        return work / f"{digest(self.identity)}.onnx"


def code_digest() -> str:
    """Hash of qcompile's source: another version may give another file for the same settings."""
    root = Path(str(qcompile.__file__)).parent
    folders = (root, root / "passes", root / "calibrators")  # the last two may be links
    return digest([file_digest(p) for f in folders for p in sorted(f.rglob("*.py"))])


# ---- what to compile


def candidates(bench: Bench, groups: tuple[str, ...]) -> Iterator[Candidate]:
    """Rows of the groups, then peers."""
    code = code_digest()
    for row in (row for row in ROWS if row.group in groups):
        yield row_candidate(bench, row, code)
    for peer in PEERS if "peers" in groups else ():
        yield peer_candidate(bench, peer)


def row_candidate(bench: Bench, row: Row, code: str) -> Candidate:
    """The model of a row, compiled by this version of qcompile."""
    try:
        recipe = recipe_of(row)
        missing = missing_passes(recipe)
    except QCompileError as error:
        return Candidate(row.group, row.name, {}, _nothing, str(error))

    def build(out: Path) -> None:
        options = Options(
            tokenizer=bench.tokenizer,
            samples=bench.samples,
            threads=bench.threads,
            verify=False,
            bench=False,
            force=True,
        )
        compile(bench.model, bench.calibration, recipe=recipe, options=options).save(out)

    identity = {"recipe": recipe.digest(), "code": code, "source": bench.source}
    obstacle = f"no pass {', '.join(missing)}" if missing else ""
    return Candidate(row.group, row.name, identity, build, obstacle)


def peer_candidate(bench: Bench, peer: Peer) -> Candidate:
    """The model of another tool, which may be missing."""
    identity = asdict(peer) | {"function": peer.function.__name__, "version": peer.version}

    def build(out: Path) -> None:
        peer.quantize(bench.model, bench.peer_feeds, out)

    obstacle = "" if peer.version else f"not installed: {peer.module}"
    return Candidate("peers", peer.name, identity | {"source": bench.source}, build, obstacle)


def _nothing(out: Path) -> None:
    """Builds nothing."""


# ---- compiling and measuring


def measure(bench: Bench, candidate: Candidate, work: Path) -> Line:
    """The candidate's line; no exception of a compiler ends the program."""
    if candidate.obstacle:
        return Line(candidate.group, candidate.name, failure=candidate.obstacle)
    model = candidate.file(work)
    try:
        cost = build_once(candidate, model)
        figures = measure_once(bench, model, model.with_suffix(f".{bench.key}.json"))
        what = integer_operators(onnx.load(model, load_external_data=False))
    except Exception as error:  # peers raise anything
        reason = str(error).strip() or "no message"
        return Line(
            candidate.group,
            candidate.name,
            failure=f"{type(error).__name__}: {reason.splitlines()[0][:200]}",
        )
    return Line(candidate.group, candidate.name, what, figures, cost)


def build_once(candidate: Candidate, model: Path) -> Cost:
    """Build the file unless it exists; the cost of building it, now or earlier."""
    note = model.with_suffix(".made.json")
    if model.is_file() and note.is_file():
        return Cost(**json.loads(note.read_text(encoding="utf-8")))
    partial = model.with_suffix(".part.onnx")
    start = time.perf_counter(), time.process_time()
    candidate.build(partial)
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    cost = Cost(round(spent[0], 2), round(spent[1], 2))
    partial.replace(model)
    note.write_text(json.dumps(asdict(cost), indent=1))
    return cost


def measure_once(bench: Bench, model: Path, note: Path) -> Figures:
    """The figures of a model, from the file ``note``, or measured and written there."""
    if note.is_file():
        return Figures(**json.loads(note.read_text(encoding="utf-8")))
    figures = bench.figures(model)
    note.write_text(json.dumps(asdict(figures), indent=1))
    return figures


# ---- printing


def markdown_line(line: Line) -> str:
    """A line of the markdown table; five digits, since cosines differ in the fourth."""
    if line.figures is None:
        return f"| {line.model} | {line.failure.replace('|', '/')} | | | | | | |"
    figures, cost = line.figures, "- | -"
    if line.cost is not None:
        cost = f"{line.cost.seconds:.1f} | {line.cost.cpu_seconds:.1f}"
    return (
        f"| {line.model} | {line.what} | {figures.spearman:.2f} | {figures.cosine_mean:.5f} "
        f"| {figures.cosine_worst:.5f} | {figures.bytes / 1e6:.1f} | {cost} |"
    )


def versions() -> dict[str, Any]:
    """Of the machine, and of every package that compiled a row."""
    peers = {p.package: p.version for p in PEERS if p.version and p.package != "onnxruntime"}
    return {"qcompile": qcompile.__version__, **kernels.environment().to_dict(), **peers}


def version_line(values: Mapping[str, Any]) -> str:
    """The line under the table."""
    isa = ", ".join(values["isa"]) or "unknown instruction sets"
    rest = [f"{k} {v}" for k, v in values.items() if k not in ("isa", "machine")]
    return f"{', '.join(rest)}; {values['machine']}, {isa}."


def closeness_table(bench: Bench, groups: tuple[str, ...], work: Path) -> list[Line]:
    """Print the table line by line; progress goes to stderr."""
    print(f"{COLUMNS}\n|{'---|' * 8}", flush=True)
    figures = measure_once(bench, bench.model, work / f"float.{bench.key}.json")
    lines = [Line("", FLOAT, figures=figures)]
    print(markdown_line(lines[0]), flush=True)
    chosen = list(candidates(bench, groups))
    for number, candidate in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {candidate.name}", file=sys.stderr, flush=True)
        lines.append(measure(bench, candidate, work))
        print(markdown_line(lines[-1]), flush=True)
    pairs, texts = (
        len(bench.texts[1]),
        len(bench.calibration.read_text(encoding="utf-8").splitlines()),
    )
    print(f"\n{pairs} pairs, {texts} sentences to calibrate; {version_line(versions())}")
    return lines


def task_table(args: argparse.Namespace) -> list[task_accuracy.Outcome]:
    """Print the table of benchmarks/task_accuracy.py, with the error of a task that fails."""
    print(f"\n{task_accuracy.COLUMNS}\n|{'---|' * 9}", flush=True)
    outcomes = []
    for folder in args.tasks:
        print(f"task {folder.name}", file=sys.stderr, flush=True)
        try:
            for outcome in task_accuracy.measure(
                folder, args.task_data, TASK_RECIPES, None, args.samples, args.threads
            ):
                outcomes.append(outcome)
                print(task_accuracy.line(outcome), flush=True)
        except QCompileError as error:
            print(f"| {folder.name} | {error} | | | | | | | |", flush=True)
    return outcomes


# ---- the command line


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of scored pairs")
    parser.add_argument("--calibration", type=Path, required=True, help="text, CSV or JSON lines")
    parser.add_argument("--tokenizer", type=Path, required=True, help="holds tokenizer.json")
    parser.add_argument("--samples", type=int, default=256, help="sentences to calibrate with")
    parser.add_argument("--rows", default=",".join(GROUPS), help="default: %(default)s")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], metavar="TASKDIR")
    parser.add_argument("--task-data", type=Path, help="folder of the tasks' splits")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--work", type=Path, help="folder that keeps models; default: temporary")
    args = parser.parse_args()
    if args.samples < 1 or args.threads < 0:
        fail("--samples must be at least 1 and --threads 0 or more")
    if args.tasks and args.task_data is None:
        fail("--tasks needs --task-data")
    for path in (args.model, args.data, args.calibration, args.tokenizer / "tokenizer.json"):
        if not path.is_file():
            fail(f"{path} is not a file")
    args.rows = groups_of(args.rows)
    return args


def run(args: argparse.Namespace, work: Path) -> None:
    """Print both tables, and write the file of --json."""
    try:
        texts = write_calibration(args.calibration, args.samples, work)
        bench = Bench(args.model, args.data, texts, args.tokenizer, args.samples, args.threads)
        lines = closeness_table(bench, args.rows, work)
    except QCompileError as error:
        fail(str(error))
    outcomes = task_table(args) if args.tasks else []
    if args.json is not None:
        values = {"versions": versions(), "models": lines, "tasks": outcomes}
        args.json.write_text(json.dumps(values, default=asdict, indent=1) + "\n")


def main() -> None:
    """Print the tables."""
    args = arguments()
    if args.work is not None:
        run(args, make_folder(args.work))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
