"""Weights and tables of few bits: bytes, closeness, latency, load time and memory in one table.

    python -m benchmarks.low_bits MODEL.onnx --data sentences.txt --eval dev.jsonl --tokenizer DIR
        [--match 'cpu W4*' ...] [--no-timing] [--list]

MODEL is a sentence encoder. Each row of _low_bits_rows.py, qcompile's and those of other tools that
are installed, compiles it, calibrated on the first sentences of --data. Cosine to the float model's
embeddings and Spearman are those of embedding_closeness.py on --eval. Latencies are ratios to the
8-bit file, which is the first row whatever --match says: both models in alternating rounds, one
text of 128 tokens and the first 32 sentences of --eval, median of the rounds with its 95 %
interval. Load time and memory are measured in a process for each model (_session_cost.py). A row
that fails says why.

Compiled files and their figures are kept in --work: an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy
from benchmarks._accuracy_run import Bench, digest, write_calibration
from benchmarks._low_bits_rows import PEERS, REFERENCE, ROWS
from benchmarks._session_cost import SessionCost, session_cost
from benchmarks.embedding_closeness import feed_of
from benchmarks.text_lengths import texts_of
from models._common import fail, make_folder
from qcompile import QCompileError
from qcompile.data.feeds import Feed, input_specs
from qcompile.ir.model_io.read_model import load
from qcompile.runtime.latency import FEWEST_ROUNDS, TimingOptions, compare_latency

HEADS = (
    "model", "MB", "of fp32", "cosine mean", "cosine worst", "Spearman", "1 x 128, to 8 bits",
    "32 sentences, to 8 bits", "load ms", "memory MB", "CPU s to compile",
)  # fmt: skip
LENGTH, SENTENCES = 128, 32
_LONGEST_REASON = 120


@dataclass(frozen=True)
class Latency:
    """Ratio to the 8-bit file: median of the rounds, with its interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """What running a model costs; ``latencies``: one for each of ``Clock.feeds``, none of the
    8-bit file itself."""

    latencies: tuple[Latency, ...]
    session: SessionCost


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    line: accuracy.Line
    timing: Timing | None = None


@dataclass
class Clock:
    """Times models against the 8-bit file ``reference``."""

    bench: Bench
    reference: Path
    rounds: int

    @cached_property
    def feeds(self) -> list[Feed]:
        """One text of 128 tokens, and the first 32 sentences, padded to the longest."""
        from tokenizers import Tokenizer

        engine = Tokenizer.from_file(str(self.bench.tokenizer / "tokenizer.json"))
        engine.enable_padding()
        engine.enable_truncation(LENGTH)
        texts, specs = self.bench.texts[0], input_specs(load(self.bench.model))
        groups = (texts_of(LENGTH, 1, texts), texts[:SENTENCES])
        return [feed_of(group, specs, engine) for group in groups]

    def timing(self, model: Path, note: Path) -> Timing:
        """From a file next to ``note``, or measured and written there."""
        key = digest([self.bench.key, self.reference.name, self.bench.threads, self.rounds])
        note = note.with_suffix(f".{key}.timing.json")
        if note.is_file():
            return timing_from(json.loads(note.read_text(encoding="utf-8")))
        found = self._measured(model)
        note.write_text(json.dumps(asdict(found), indent=1))
        return found

    def _measured(self, model: Path) -> Timing:
        options = TimingOptions(threads=self.bench.threads, rounds=self.rounds)
        latencies = []
        for feed in self.feeds if model != self.reference else ():
            models = [("8 bits", self.reference), ("row", model)]
            ratio = compare_latency(models, feed, options).ratio(1)
            latencies.append(Latency(ratio.median, ratio.low, ratio.high))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "feed.npz"
            inputs: dict[str, Any] = dict(self.feeds[0])
            np.savez(file, **inputs)
            cost = session_cost(model, file, self.bench.threads)
        return Timing(tuple(latencies), cost)


def timing_from(values: dict[str, Any]) -> Timing:
    """The inverse of ``dataclasses.asdict``, for timings that were stored as JSON."""
    latencies = tuple(Latency(**value) for value in values["latencies"])
    return Timing(latencies, SessionCost(**values["session"]))


# ---- what to compile


def chosen(patterns: Sequence[str]) -> list[str]:
    """Names of rows that match a pattern, all without patterns. Ends where one matches nothing."""
    names = [*(row.name for row in ROWS), *(peer.name for peer in PEERS)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            fail(f"--match: {pattern!r} matches no row; --list prints their names")
    return [n for n in names if not patterns or any(fnmatchcase(n, p) for p in patterns)]


def candidates(bench: Bench, names: Sequence[str]) -> Iterator[accuracy.Candidate]:
    """The 8-bit file, then the other rows of these names."""
    code = accuracy.code_digest()
    yield accuracy.row_candidate(bench, REFERENCE, code)
    for row in ROWS:
        if row.name in names and row != REFERENCE:
            yield accuracy.row_candidate(bench, row, code)
    for peer in PEERS:
        if peer.name in names:
            yield accuracy.peer_candidate(bench, peer)


# ---- printing


def cells(entry: Entry, float_bytes: int) -> list[str]:
    """Of a row, one for each of HEADS; five digits of closeness, since it differs in the fourth."""
    line, timing = entry.line, entry.timing
    if line.figures is None:
        reason = textwrap.shorten(line.failure.replace("|", "/"), _LONGEST_REASON)
        return [line.model, reason, *[""] * (len(HEADS) - 2)]
    figures = line.figures
    found = [
        line.model,
        f"{figures.bytes / 1e6:.2f}",
        f"{figures.bytes / float_bytes:.1%}",
        f"{figures.cosine_mean:.5f}",
        f"{figures.cosine_worst:.5f}",
        f"{figures.spearman:.2f}",
    ]
    return [*found, *_timing_cells(timing), f"{line.cost.cpu_seconds:.1f}" if line.cost else "-"]


def _timing_cells(timing: Timing | None) -> list[str]:
    if timing is None:
        return ["-"] * 4
    ratios = [f"{t.median:.2f} ({t.low:.2f} to {t.high:.2f})" for t in timing.latencies]
    memory = timing.session.memory
    return [
        *(ratios or ["1", "1"]),
        f"{timing.session.load_ms:.0f}",
        "-" if memory is None else f"{memory / 1e6:.0f}",
    ]


def markdown(values: Sequence[str]) -> str:
    """A line of the table."""
    return f"| {' | '.join(values)} |"


def table(bench: Bench, args: argparse.Namespace, work: Path) -> list[Entry]:
    """Print the table line by line; progress goes to stderr."""
    print(f"{markdown(HEADS)}\n|{'---|' * len(HEADS)}", flush=True)
    figures = accuracy.measure_once(bench, bench.model, work / f"float.{bench.key}.json")
    todo = list(candidates(bench, args.names))
    clock = None if args.no_timing else Clock(bench, todo[0].file(work), args.rounds)
    entries = []
    for number, candidate in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {candidate.name}", file=sys.stderr, flush=True)
        line = accuracy.measure(bench, candidate, work)
        entries.append(timed(line, candidate.file(work), candidate.file(work), clock))
        if number == 1:  # only now there is a file that the float model can be compared with
            line = accuracy.Line("", accuracy.FLOAT, figures=figures)
            entries.insert(0, timed(line, bench.model, work / "float.onnx", clock))
            print(markdown(cells(entries[0], figures.bytes)), flush=True)
        print(markdown(cells(entries[-1], figures.bytes)), flush=True)
    texts = len(bench.calibration.read_text(encoding="utf-8").splitlines())
    versions = accuracy.version_line(accuracy.versions())
    print(f"\n{len(bench.texts[1])} pairs, {texts} sentences to calibrate; {versions}")
    return entries


def timed(line: accuracy.Line, model: Path, note: Path, clock: Clock | None) -> Entry:
    """The row with its timing; no exception of a run ends the program."""
    if line.figures is None or clock is None or not clock.reference.is_file():
        return Entry(line)
    try:
        return Entry(line, clock.timing(model, note))
    except Exception as error:  # a file of another tool may fail in any way
        print(f"{line.model}: not timed: {error}", file=sys.stderr)
        return Entry(line)


# ---- the command line


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, help="calibration: text, CSV or JSON lines")
    parser.add_argument("--eval", type=Path, help="JSON lines of scored pairs")
    parser.add_argument("--tokenizer", type=Path, help="holds tokenizer.json")
    parser.add_argument("--samples", type=int, default=256, help="sentences to calibrate with")
    parser.add_argument(
        "--match", action="append", default=[], metavar="GLOB", help="rows, by name; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="print the names of rows and end")
    parser.add_argument("--no-timing", action="store_true", help="bytes and closeness only")
    parser.add_argument("--rounds", type=int, default=6, help="of a latency")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--work", type=Path, help="folder that keeps models; default: temporary")
    args = parser.parse_args()
    args.names = chosen(args.match)
    if args.list:
        return args
    for name in ("model", "data", "eval", "tokenizer"):
        if getattr(args, name) is None:
            parser.error(f"{'MODEL' if name == 'model' else f'--{name}'} is missing")
    if args.samples < 1 or args.threads < 0 or args.rounds < FEWEST_ROUNDS:
        parser.error(
            f"--samples must be at least 1, --threads 0 or more, --rounds {FEWEST_ROUNDS} or more"
        )
    for path in (args.model, args.data, args.eval, args.tokenizer / "tokenizer.json"):
        if not path.is_file():
            fail(f"{path} is not a file")
    return args


def run(args: argparse.Namespace, work: Path) -> None:
    """Print the table, and write the file of --json."""
    try:
        texts = write_calibration(args.data, args.samples, work)
        bench = Bench(args.model, args.eval, texts, args.tokenizer, args.samples, args.threads)
        entries = table(bench, args, work)
    except QCompileError as error:
        fail(str(error))
    if args.json is not None:
        values = {"versions": accuracy.versions(), "models": entries}
        args.json.write_text(json.dumps(values, default=asdict, indent=1) + "\n")


def main() -> None:
    """Print the table."""
    args = arguments()
    if args.list:
        print("\n".join(args.names))
    elif args.work is not None:
        run(args, make_folder(args.work))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(args, Path(folder))


if __name__ == "__main__":
    main()
