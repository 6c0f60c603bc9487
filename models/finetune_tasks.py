"""Fine-tunes all-MiniLM-L6-v2 on text classification tasks, and exports each model to ONNX.

    python -m models.finetune_tasks DEST --data FOLDER --tasks stsb,mrpc,rte,trec,banking77

FOLDER/<task>/ holds train.jsonl and the split that the task is measured on (test.jsonl of mrpc,
trec and banking77, dev.jsonl of rte and stsb): JSON lines with text, or text_a and text_b, and
label or score. Writes model.onnx, the tokenizer files, model.safetensors and task.json (labels,
metric, float score, versions) into DEST/<task>; a task that has a model.onnx is skipped unless
--force. rte starts from the encoder in DEST/stsb. The same seed, threads and versions give
the same model. benchmarks/task_accuracy.py measures the models.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models._common import fail, make_folder, make_parser, need
from models._labelled_text import (
    BATCH,
    Examples,
    Floats,
    Row,
    Task,
    encode,
    examples_of,
    feed_of,
    gather,
    labels_of,
    metric,
    read_rows,
    targets,
)
from models.all_minilm_l6 import copy_tokenizer, model_folder

OPSET = 18
WARMUP = 0.1
WINDOW = 16  # batches whose rows are sorted together
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Training:
    """A task and how it is trained; ``rate`` is the highest learning rate.

    ``start`` names the task whose encoder it starts from: 2,490 pairs of rte alone hardly teach an
    encoder of single sentences to compare two.
    """

    task: Task
    epochs: int
    rate: float = 1e-4
    start: str = ""


TRAININGS = {
    t.task.name: t
    for t in (
        Training(Task("stsb", "dev", "spearman", 128), epochs=2),
        Training(Task("mrpc", "test", "accuracy", 128), epochs=3),
        Training(Task("rte", "dev", "accuracy", 128), epochs=3, start="stsb"),
        Training(Task("trec", "test", "accuracy", 64), epochs=3),
        Training(Task("banking77", "test", "accuracy", 64), epochs=3, rate=3e-4),
    )
}


def schedule(step: int, steps: int) -> float:
    """The share of the highest rate at a step: linear warm-up, then linear decay to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return (steps - step) / max(1, steps - warm)


def shuffled(lengths: list[int], generator: np.random.Generator) -> list[list[int]]:
    """Batches of row numbers in random order, of similar length, to keep padding low."""
    order = generator.permutation(len(lengths)).tolist()
    window = BATCH * WINDOW
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [part[i : i + BATCH] for i in range(0, len(part), BATCH)]
    return [batches[i] for i in generator.permutation(len(batches))]


def load(source: Path, rows: list[Row], labels: tuple[str | int, ...]) -> Any:
    """The encoder with a new head; a regression starts at the mean score."""
    torch, transformers = need("torch"), need("transformers")
    transformers.logging.set_verbosity_error()
    model = transformers.BertForSequenceClassification.from_pretrained(
        source, num_labels=len(labels) or 1, ignore_mismatched_sizes=True, local_files_only=True
    )
    if labels:
        model.config.id2label = {i: str(label) for i, label in enumerate(labels)}
        model.config.label2id = {str(label): i for i, label in enumerate(labels)}
    else:
        with torch.no_grad():
            model.classifier.bias.fill_(float(targets(rows, ()).mean()))
    return model


def start_of(training: Training, dest: Path) -> Path:
    """The transformers folder that the encoder's weights come from."""
    if not training.start:
        return model_folder()
    folder = dest / training.start
    if not (folder / "model.safetensors").is_file():
        fail(f"{training.task.name} starts from {training.start}, which {folder} lacks: train it")
    return folder


def tensors(feed: dict[str, Any]) -> dict[str, Any]:
    """A feed as torch tensors."""
    torch = need("torch")
    return {name: torch.from_numpy(array) for name, array in feed.items()}


def loss_of(model: Any, feed: dict[str, Any], expected: Floats, bf16: bool) -> Any:
    """Cross entropy, or the squared error of a regression."""
    torch = need("torch")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(**tensors(feed)).logits
    if logits.shape[1] == 1:
        return torch.nn.functional.mse_loss(logits[:, 0].float(), torch.from_numpy(expected))
    return torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(expected))


def train(
    model: Any, rows: list[Row], training: Training, tokenizer: Path, args: argparse.Namespace
) -> Iterator[float]:
    """Trains the model in place; yields the mean loss of each epoch."""
    torch = need("torch")
    encoded, pad = encode([row.text for row in rows], tokenizer, training.task.max_length)
    expected = targets(rows, training.task.labels)
    lengths = [len(e.ids) for e in encoded]
    generator = np.random.default_rng(args.seed)
    steps = training.epochs * len(shuffled(lengths, np.random.default_rng(0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    model.train()
    for _ in range(training.epochs):
        losses = []
        for numbers in shuffled(lengths, generator):
            feed = feed_of([encoded[i] for i in numbers], pad)
            loss = loss_of(model, feed, expected[numbers], args.bf16)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        yield float(np.mean(losses))


def torch_logits(model: Any, examples: Examples) -> Floats:
    """Logits of the trained model, float64 [rows, outputs]."""
    model.eval()
    with need("torch").no_grad():
        logits = [model(**tensors(feed)).logits.numpy() for _, feed in examples.feeds]
    return gather(examples, logits)


def export(model: Any, folder: Path) -> Path:
    """The function that optimum's main_export calls with the loaded model; returns the file."""
    need("optimum.exporters.onnx").onnx_export_from_model(
        model=model,
        output=folder,
        opset=OPSET,
        task="text-classification",
        do_validation=False,
    )
    return folder / "model.onnx"


def difference(path: Path, examples: Examples, expected: Floats, threads: int) -> float:
    """The largest absolute difference of the logits between ONNX Runtime and torch."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits = [session.run(["logits"], feed)[0] for _, feed in examples.feeds]
    return float(np.abs(gather(examples, logits) - expected).max())


def versions() -> dict[str, str]:
    """Versions of the packages that the model depends on."""
    names = ("torch", "transformers", "onnxruntime")
    return {name: str(need(name).__version__) for name in names}


def make(training: Training, folder: Path, args: argparse.Namespace) -> None:
    """Trains one task and writes its folder; task.json comes last."""
    torch, source, data = need("torch"), model_folder(), args.data / training.task.name
    torch.manual_seed(args.seed)
    rows = read_rows(data / "train.jsonl")
    task = replace(training.task, labels=labels_of(rows))
    training = replace(training, task=task, epochs=args.epochs or training.epochs)
    examples = examples_of(task, read_rows(data / f"{task.split}.jsonl"), source)
    weights = start_of(training, folder.parent)
    model, start = load(weights, rows, task.labels), time.perf_counter()
    for epoch, loss in enumerate(train(model, rows, training, source, args), 1):
        spent = time.perf_counter() - start
        print(
            f"{task.name}: epoch {epoch}/{training.epochs}, loss {loss:.4f}, {spent:.0f} s",
            flush=True,
        )
    logits = torch_logits(model, examples)
    path = export(model, make_folder(folder))
    model.save_pretrained(folder)
    copy_tokenizer(source, folder)
    worst = difference(path, examples, logits, args.threads)
    if not worst < TOLERANCE:
        fail(f"{path}: differs from torch by {worst:.1e}, at most {TOLERANCE:.0e} expected", 1)
    score = round(metric(examples, logits), 2)
    settings = {"epochs": training.epochs, "rate": training.rate, "seed": args.seed}
    settings |= {"start": training.start, "bf16": args.bf16, "threads": torch.get_num_threads()}
    values = asdict(task) | {"score": score, "training": settings, "versions": versions()}
    (folder / "task.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(
        f"{path}: {task.metric} {score:.2f} on {task.split}, torch differs by {worst:.1e} at most"
    )


def chosen(names: str) -> list[Training]:
    """The trainings of a comma-separated list."""
    for name in names.split(","):
        if name not in TRAININGS:
            fail(f"unknown task {name!r}, expected some of {', '.join(TRAININGS)}")
    return [TRAININGS[name] for name in names.split(",")]


def main() -> None:
    """Runs the recipe from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' splits")
    parser.add_argument("--tasks", default=",".join(TRAININGS), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, help="default: 2 or 3, by task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument(
        "--bf16", action="store_true", help="train in bfloat16: faster on some CPUs"
    )
    parser.add_argument("--force", action="store_true", help="train again if the model exists")
    args = parser.parse_args()
    if args.threads < 0 or args.seed < 0 or (args.epochs is not None and args.epochs < 1):
        fail("--threads and --seed must be 0 or more, --epochs at least 1")
    trainings = chosen(args.tasks)
    if args.threads:
        need("torch").set_num_threads(args.threads)
    for training in trainings:
        folder = args.dest / training.task.name
        if (folder / "model.onnx").is_file() and not args.force:
            print(f"{folder / 'model.onnx'} exists, --force trains it again")
            continue
        make(training, folder, args)


if __name__ == "__main__":
    main()
