"""What quantization costs on labelled tasks: metric of both models, flips, cosine of the logits.

    python -m models.finetune_tasks tasks/ --data FOLDER
    python -m benchmarks.task_accuracy tasks/rte tasks/mrpc --data FOLDER --recipe default

Each TASKDIR holds model.onnx, tokenizer.json and task.json, as models/finetune_tasks.py writes
them. The model is compiled on the first texts of FOLDER/<task>/train.jsonl, gates not enforced,
and both are scored on the split that task.json names. Flips are the share of examples whose argmax
differs, and of a regression the mean absolute difference, without a percent sign; the cosine is
the mean over the examples' logits, and of a regression that of all predictions as one vector.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models._common import fail
from models._labelled_text import (
    Examples,
    Floats,
    Row,
    Task,
    examples_of,
    flips,
    gather,
    metric,
    read_rows,
)
from qcompile import Options, QCompileError, compile
from qcompile.runtime.evaluation.closeness import cosine
from qcompile.runtime.session import Session, SessionOptions

DEFAULT = "default"
COLUMNS = "| task | recipe | metric | n | float | compiled | difference | flips | cosine |"


@dataclass(frozen=True)
class Scored:
    """A model's logits for all examples, and its score."""

    logits: Floats
    score: float


@dataclass(frozen=True)
class Outcome:
    """One line of the table: a task compiled by one recipe, against its float model."""

    task: str
    recipe: str
    metric: str
    split: str
    n: int
    float_score: float
    score: float
    difference: float
    flips: float
    cosine: float


def read_task(folder: Path) -> Task:
    """The task that a folder of models/finetune_tasks.py holds."""
    path = folder / "task.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name, split, kind = values["name"], values["split"], values["metric"]
        return Task(name, split, kind, int(values["max_length"]), tuple(values["labels"]))
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{path} is not a task.json of models/finetune_tasks.py: {error!r}")


def load_examples(folder: Path, data: Path) -> Examples:
    """The task's evaluation split, tokenized by the folder's tokenizer."""
    task = read_task(folder)
    return examples_of(task, read_rows(data / task.name / f"{task.split}.jsonl"), folder)


def score(model: bytes | Path, examples: Examples, threads: int = 0) -> Scored:
    """Run a model over the examples, batch by batch; its first output has the logits."""
    session = Session(model, SessionOptions(threads=threads, exact=False))
    name = session.outputs[0]
    batches = [session.run(feed, [name])[name] for _, feed in examples.feeds]
    logits = gather(examples, batches)
    return Scored(logits, metric(examples, logits))


def mean_cosine(a: Floats, b: Floats) -> float:
    """Mean over rows of the logits' cosine; the cosine of the columns where a row has one logit."""
    if a.shape[1] == 1:
        return cosine(a, b)
    return float(np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)]))


def outcome(recipe: str, examples: Examples, reference: Scored, candidate: Scored) -> Outcome:
    """One line of the table."""
    task = examples.task
    return Outcome(
        task.name,
        recipe,
        task.metric,
        task.split,
        len(examples.targets),
        reference.score,
        candidate.score,
        candidate.score - reference.score,
        flips(reference.logits, candidate.logits),
        mean_cosine(reference.logits, candidate.logits),
    )


def text_fields(row: Row) -> dict[str, str]:
    """The row's text under the keys that qcompile reads from JSON lines."""
    if isinstance(row.text, str):
        return {"text": row.text}
    return dict(zip(("text_a", "text_b"), row.text, strict=True))


def compile_task(
    folder: Path,
    rows: Sequence[Row],
    recipe: str = DEFAULT,
    target: str | None = None,
    threads: int = 0,
) -> bytes:
    """The folder's model, calibrated on the texts of rows; a failed gate is ignored."""
    chosen = None if recipe == DEFAULT else recipe
    options = Options(
        tokenizer=folder,
        samples=len(rows),
        threads=threads,
        verify=False,
        bench=False,
        force=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        texts = Path(temporary) / "calibration.jsonl"
        texts.write_text("".join(json.dumps(text_fields(row)) + "\n" for row in rows))
        model = folder / "model.onnx"
        return compile(model, texts, target=target, recipe=chosen, options=options).model


def measure(
    folder: Path,
    data: Path,
    recipes: Sequence[str],
    target: str | None = None,
    samples: int = 256,
    threads: int = 0,
) -> Iterator[Outcome]:
    """One outcome per recipe; the float model runs once."""
    examples = load_examples(folder, data)
    rows = read_rows(data / examples.task.name / "train.jsonl")[:samples]
    reference = score(folder / "model.onnx", examples, threads)
    for recipe in recipes:
        model = compile_task(folder, rows, recipe, target, threads)
        yield outcome(recipe, examples, reference, score(model, examples, threads))


def line(item: Outcome) -> str:
    """A line of the markdown table."""
    flipped = f"{item.flips:.4f}" if item.metric == "spearman" else f"{item.flips:.2f} %"
    return (
        f"| {item.task} | {item.recipe} | {item.metric}, {item.split} | {item.n} "
        f"| {item.float_score:.2f} | {item.score:.2f} | {item.difference:+.2f} "
        f"| {flipped} | {item.cosine:.4f} |"
    )


def outcomes(args: argparse.Namespace) -> Iterator[Outcome]:
    """All outcomes that the command line requests, folder by folder."""
    for folder in args.folders:
        try:
            yield from measure(
                folder,
                args.data,
                args.recipe or [DEFAULT],
                args.target,
                args.samples,
                args.threads,
            )
        except QCompileError as error:
            fail(f"{folder}: {error}")


def main() -> None:
    """Print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="TASKDIR")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' splits")
    parser.add_argument(
        "--recipe", action="append", help="name or file, 'default' for none; repeatable"
    )
    parser.add_argument("--target", help="default: the recipe's")
    parser.add_argument("--samples", type=int, default=256, help="calibration texts")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.samples < 1 or args.threads < 0:
        fail("--samples must be at least 1 and --threads 0 or more")
    if args.json:
        print(json.dumps([asdict(item) for item in outcomes(args)], indent=1))
        return
    print(f"{COLUMNS}\n|{'---|' * 9}")
    for item in outcomes(args):
        print(line(item), flush=True)


if __name__ == "__main__":
    main()
