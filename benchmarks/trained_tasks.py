"""The paper's table on small encoders: labelled tasks, calibrated alone and trained, at few bits.

    python -m models.finetune_tasks tasks/ --data FOLDER
    python -m benchmarks.trained_tasks tasks/* --data FOLDER --work FOLDER [--seeds 3]
        [--match 'qdq W4*' ...] [--epochs N]

Each TASKDIR is one of models/finetune_tasks.py. For each setting and seed, the model is trained
with the target's quantizers in the loop (qcompile.train), on FOLDER/<task>/train.jsonl, and
evaluated on the split that task.json names. A cell has the mean over the seeds of the difference
to the float model, in points, by calibration alone → trained; flips are texts that the trained
file puts into another class than the float model, task by task. Bondarenko et al. 2021 have, for
GLUE of BERT-base: float 83.06, W8A8 83.26, W4A8 82.64, and 82.29 with 2-bit token embeddings.

One epoch, and three of the tasks with fewer than 3,000 texts: one of RTE's is only 78 steps.

Figures, and states of interrupted trainings, are kept in --work: the same command continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import qcompile
from benchmarks import accuracy
from benchmarks._accuracy_run import digest
from benchmarks.task_accuracy import read_task
from models._common import fail, make_folder
from qcompile import Options, QCompileError, TrainingOptions

_SMALL = 3000  # texts; with fewer, one epoch is too few steps


@dataclass(frozen=True)
class Setting:
    """A row of the table: a target, the bits of weights and token table, and what is learned.

    distill: from the float model's answers, without labels.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    distill: bool = False


SETTINGS = (
    Setting("qdq W8A8", {"target": "qdq"}),
    Setting("qdq W4A8 E4", {"target": "qdq", "weight_bits": 4, "embedding_bits": 4}),
    Setting("qdq W4A8 E2", {"target": "qdq", "weight_bits": 4, "embedding_bits": 2}),
    Setting(
        "qdq W2A8 E2",
        {"target": "qdq", "weight_bits": 2, "embedding_bits": 2, "weight_block": 0},
    ),
    Setting("cpu W8A8", {"target": "cpu"}),
    Setting("cpu W8A8, distilled", {"target": "cpu"}, distill=True),
    Setting("cpu W4A8 E4", {"target": "cpu", "weight_bits": 4, "embedding_bits": 4}),
)


@dataclass(frozen=True)
class Run:
    """One training: metric, times 100, of the float model, of calibration alone and of the file.

    ``flips``: share of texts that the file puts into another class than the float model; None for
    regression. ``memory``: peak bytes of the process.
    """

    task: str
    setting: str
    seed: int
    float_score: float
    calibrated: float
    trained: float
    flips: float | None
    bytes: int
    float_bytes: int
    seconds: float
    memory: int


def run(folder: Path, setting: Setting, seed: int, args: argparse.Namespace, code: str) -> Run:
    """Train, or read what an earlier run has found."""
    task = read_task(folder)
    model = folder / "model.onnx"
    data = args.data / task.name
    epochs = args.epochs or usual_epochs(data / "train.jsonl")
    learned = [setting.settings, setting.distill, seed, epochs]
    key = digest([task.name, *learned, model.stat().st_size, code])
    note, state = args.work / f"{key}.json", args.work / f"{key}.pt"
    if note.is_file():
        return Run(**json.loads(note.read_text(encoding="utf-8")))
    training = TrainingOptions(
        data / "train.jsonl",
        data / f"{task.split}.jsonl",
        distill=setting.distill,
        epochs=epochs,
        max_drop=None,
        state=state,
    )
    # In a process of its own, so that the peak of memory is its own too.
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        done = alone.submit(trained, folder, setting, seed, training, args.threads).result()
    note.write_text(json.dumps(asdict(done), indent=1) + "\n")
    state.unlink(missing_ok=True)
    return done


def usual_epochs(texts: Path) -> float:
    """Passes over a file of texts where none are asked for."""
    with texts.open(encoding="utf-8") as lines:
        return 1.0 if sum(1 for _ in lines) >= _SMALL else 3.0


def trained(
    folder: Path, setting: Setting, seed: int, training: TrainingOptions, threads: int
) -> Run:
    """Train, and measure what was compiled."""
    options = Options(bench=False, threads=threads, force=True)
    result = qcompile.train(folder, training, seed=seed, options=options, **setting.settings)
    account, report = result.report.training, result.report
    assert account is not None and account.metric is not None  # of a training that was verified
    found = account.metric
    return Run(
        read_task(folder).name,
        setting.name,
        seed,
        found.float,
        found.calibrated,
        found.compiled,
        found.flips,
        report.bytes,
        report.float_bytes,
        account.seconds,
        max(report.memory.values()),
    )


# ---- printing


def cell(runs: Sequence[Run]) -> str:
    """Differences to the float model, by calibration alone and trained, means over seeds."""
    if not runs:
        return "-"
    before = mean(r.calibrated - r.float_score for r in runs)
    after = mean(r.trained - r.float_score for r in runs)
    return f"{before:+.2f} → {after:+.2f}"


def line(setting: Setting, tasks: Sequence[str], runs: Sequence[Run]) -> str:
    """A row of the table: size, each task, their mean, flips of each, minutes of a training,
    peak memory."""
    size = mean(r.float_bytes / r.bytes for r in runs)
    cells = [cell([r for r in runs if r.task == task]) for task in tasks]
    minutes = mean(r.seconds for r in runs) / 60
    peak = f"{max(r.memory for r in runs) / 1e9:.1f}"
    flips = [changed(runs, task) for task in tasks]
    shown = [
        setting.name,
        f"{size:.1f}",
        *cells,
        cell(runs),
        " ".join(flips),
        f"{minutes:.0f}",
        peak,
    ]
    return f"| {' | '.join(shown)} |"


def changed(runs: Sequence[Run], task: str) -> str:
    """Per cent of texts in another class than the float model's, the mean over the seeds."""
    found = [r.flips for r in runs if r.task == task and r.flips is not None]
    return f"{100 * mean(found):.1f}" if found else "-"


def heads(tasks: Sequence[str]) -> str:
    """The first two lines of the table."""
    names = ["setting", "times smaller", *tasks, "mean", "flips, %", "minutes", "GB"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def table(args: argparse.Namespace) -> Iterator[str]:
    """Lines of the table, one setting after the other."""
    tasks, code = [read_task(folder).name for folder in args.folders], accuracy.code_digest()
    yield heads(tasks)
    for setting in args.settings:
        runs = [
            run(folder, setting, seed, args, code)
            for folder in args.folders
            for seed in range(args.seeds)
        ]
        yield line(setting, tasks, runs)


def chosen(patterns: Sequence[str]) -> list[Setting]:
    """Settings whose names match a pattern, all without patterns."""
    found = [s for s in SETTINGS if not patterns or any(fnmatchcase(s.name, p) for p in patterns)]
    if not found:
        fail(f"--match: no setting matches, expected some of {', '.join(s.name for s in SETTINGS)}")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="TASKDIR")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' splits")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps figures")
    parser.add_argument("--match", action="append", default=[], metavar="GLOB", help="settings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="default: 1, of small tasks 3")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    args = parser.parse_args()
    if args.seeds < 1 or (args.epochs is not None and args.epochs <= 0) or args.threads < 0:
        fail("--seeds must be at least 1, --epochs over 0, --threads 0 or more")
    args.settings = chosen(args.match)
    make_folder(args.work)
    try:
        for text in table(args):
            print(text, flush=True)
    except QCompileError as error:
        fail(str(error))
    versions = accuracy.version_line(accuracy.versions())
    epochs = "1, of small tasks 3" if args.epochs is None else f"{args.epochs:g}"
    print(f"\nseeds: {args.seeds}, epochs: {epochs}; {versions}")


if __name__ == "__main__":
    main()
