"""Runs qcompile on random valid models and on damaged real files; prints a summary.

`graphs`: each is compiled in every form, and its outputs are compared with the float model's under
a bound that follows from the model (see _differential_check.py). `models`, `data`: a file is
damaged, and `compile` must end with a one-line error or a correct result. Every case runs in a
separate process, under limits of time and memory, and is determined by its number: --start
continues a run. Failing cases are written into DEST, as small as possible, with the command line
that reproduces them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.robustness import (
    _differential_check,
    _isolated_process,
    _random_graphs,
    _random_operators,
    hostile,
)
from benchmarks.robustness._corrupt_files import damage
from benchmarks.robustness._hostile_data import TOKENIZER, text_model, tokenizer
from models._common import fail, make_folder
from qcompile.commands.cli import main as qcompile

KINDS = ("graphs", "models", "data")
SECONDS = 60.0
MEMORY = 6 << 30
PEAK = 3e9  # resident memory: a damaged real file may still have weights of 500 MB
COUNTS = (1, 2, 3, 4, 6, 8, 12)  # numbers of operators to try for a smaller failing graph
# Counted but not faults: a refusal of a valid graph, and a float model without finite outputs.
NO_FAULTS = ("refused", "unrunnable", "infinite")


@dataclass(frozen=True)
class Case:
    """One case: ``files`` writes its inputs into a folder, ``run`` compiles them there."""

    kind: str
    number: int
    run: Callable[[Path], object]
    files: Callable[[Path], None]


def graph_case(number: int, count: int = 12) -> Case:
    def run(folder: Path) -> None:
        model = _random_operators.build(number, count)
        for fault in _differential_check.check(model, _random_graphs.feeds(model, number)):
            print("FAULT", fault)

    def files(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(
            _random_operators.build(number, count).SerializeToString()
        )

    return Case("graphs", number, run, files)


def model_case(number: int, sources: Sequence[Path]) -> Case:
    """A damaged model: one of the source files, or a random graph."""

    def files(folder: Path) -> None:
        rng = np.random.default_rng([number, 3])
        if sources and rng.random() < 0.8:
            data = sources[int(rng.integers(len(sources)))].read_bytes()
        else:
            data = _random_operators.build(int(rng.integers(1 << 30))).SerializeToString()
        other = _random_operators.build(number % 100).SerializeToString()
        (folder / "model.onnx").write_bytes(damage(data, number, other, fields=True))

    def run(folder: Path) -> None:
        mode = ("dynamic", "weight-only", "float")[number % 3]
        if number % 7 == 0:
            qcompile(["inspect", str(folder / "model.onnx"), "--all"])
        target = ["--target", "qdq"] if mode != "dynamic" and number % 2 else []
        out = ["-o", str(folder / "out.onnx"), "--no-bench", "--mode", mode, *target]
        qcompile(["compile", str(folder / "model.onnx"), *out], color=True)

    return Case("models", number, run, files)


def data_case(number: int) -> Case:
    """Damaged data for a valid model: .npz, text, a tokenizer or a recipe."""
    kind = ("x.npz", "x.jsonl", "x.csv", "tokenizer.json", "r.yaml")[number % 5]

    def files(folder: Path) -> None:
        text_model(folder)
        home = Path(tokenizer(folder))
        rng = np.random.default_rng(number % 11)
        np.savez(folder / "x.npz", input_ids=rng.integers(0, 4, (8, 5)))
        (folder / "x.jsonl").write_text('{"text": "a b"}\n{"text_a": "a", "text_b": "b"}\n' * 8)
        (folder / "x.csv").write_text('text\n"a, b"\nb a\n' * 4)
        (folder / "r.yaml").write_text(
            "target: cpu\nprecision: {'*w*': 8, 'h': float}\nkeep_float: []\nseed: 3\n"
            "calibrator: percentile{percentile=99.9}\ntransforms: widen-ranges\n"
        )
        broken = home / kind if kind == "tokenizer.json" else folder / kind
        whole = broken.read_bytes()
        broken.write_bytes(damage(whole, number, str(TOKENIZER).encode(), fields=False))

    def run(folder: Path) -> None:
        data = kind if kind in ("x.npz", "x.jsonl", "x.csv") else "x.jsonl"
        args = ["--data", str(folder / data), "--tokenizer", str(folder / "tokenizer")]
        args += ["--recipe", str(folder / "r.yaml")] if kind == "r.yaml" else []
        out = ["-o", str(folder / "out.onnx"), "--no-bench", *args]
        qcompile(["compile", str(folder / "model.onnx"), *out], color=True)

    return Case("data", number, run, files)


def judge(case: Case) -> list[str]:
    """What is wrong with the outcome of a case; empty where nothing is."""
    with tempfile.TemporaryDirectory() as home:
        folder, log = Path(home, "case"), Path(home, "log")
        folder.mkdir()
        if case.kind == "graphs":
            end = _isolated_process.run(lambda: case.run(folder), SECONDS, MEMORY, log)
            lines = end.output.splitlines()
            results = [x.removeprefix("FAULT ") for x in lines if x.startswith("FAULT")]
            if end.hung or end.crashed or end.code:
                last = end.output.strip().splitlines()[-1:]
                results.append(f"crashed: {'hung' if end.hung else end.signal or last}")
            return results
        case.files(folder)
        before = hostile.listing(folder)
        end = _isolated_process.run(lambda: case.run(folder), SECONDS, MEMORY, log)
        fault = hostile.judge(end, folder / "out.onnx", before, PEAK)
        return [fault] if fault else []


def shrunk(case: Case) -> Case:
    """The same case with the fewest operators that still fail."""
    if case.kind != "graphs":
        return case
    for count in COUNTS:
        smaller = graph_case(case.number, count)
        if _faults(judge(smaller)):
            return smaller
    return case


def _faults(results: Sequence[str]) -> list[str]:
    return [r for r in results if not r.startswith(NO_FAULTS)]


def keep(case: Case, faults: Sequence[str], dest: Path) -> None:
    """Write a case and the command line that reproduces it."""
    folder = make_folder(dest / f"{case.kind}-{case.number}")
    shrunk(case).files(folder)
    replay = f"python -m benchmarks.robustness.fuzz {case.kind} --start {case.number} --count 1"
    (folder / "fault.txt").write_text("\n".join([replay, *faults, ""]))


def main() -> None:
    """Run the cases of the command line; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="models to damage")
    parser.add_argument("--dest", type=Path, help="folder for failing cases")
    parser.add_argument("--tell", action="store_true", help="print refusals too")
    args = parser.parse_args()
    missing = [p for p in args.files if not p.is_file()]
    if missing:
        fail(f"{missing[0]} is not a file")
    make = {"graphs": graph_case, "data": data_case}
    hostile.preload()
    ends: Counter[str] = Counter()
    began = time.monotonic()
    for number in range(args.start, args.start + args.count):
        case = model_case(number, args.files) if args.kind == "models" else make[args.kind](number)
        results = judge(case)
        faults = _faults(results)
        ends.update(r.split(":")[0] for r in results)
        ends["good" if not faults else "bad"] += 1
        for line in results if args.tell else faults:
            print(f"{args.kind} {number}: {line[:300]}", flush=True)
        if faults and args.dest:
            keep(case, faults, args.dest)
    seconds = time.monotonic() - began
    print(f"{args.count} cases from {args.start}, {seconds:.0f} s: {dict(sorted(ends.items()))}")
    sys.exit(bool(ends["bad"]))


if __name__ == "__main__":
    main()
