"""From a transformers folder to an optimum pipeline, for every architecture and task.

    python -m benchmarks.robustness.architectures [NAME ...] [--task TASK]

Writes small encoders with random weights (and MiniLM's real ones), runs `qcompile export` and
`compile`, loads the result in optimum.onnxruntime's ORTModelFor..., runs a transformers pipeline on
it, and prints a row for each: the largest difference of the export from torch, the number of int8
linear layers, the cosine of the compiled model's outputs to the float model's, mean and worst over
held-out sentences, and their SQNR. "same" is the number of sentences, of eight, for which the
pipeline's answer is that of the float model: label, span, labels of all tokens, or the sentence
with the nearest vector. Without optimum, which does not support transformers 5, the pipeline is
skipped and "same" is "-".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from models import _random_encoders, all_minilm_l6
from models._common import fail, need
from models._random_encoders import ARCHITECTURES, SENTENCES, TASKS

ORT_CLASSES = {
    "feature-extraction": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
}
REAL = "minilm-l6"
PROBES = 8


@dataclass(frozen=True)
class Row:
    """The results of one folder."""

    name: str
    task: str
    report: dict[str, Any]
    export: dict[str, Any]
    same: int | None

    def text(self) -> str:
        """A row of the table."""
        outputs = self.report["verify"]["outputs"]
        mean = min(o["mean_cosine"] for o in outputs)
        worst = min(o["worst_cosine"] for o in outputs)
        noise = min(o["sqnr_db"] for o in outputs)
        same = "-" if self.same is None else f"{self.same} of {PROBES}"
        return (
            f"| {self.name} | {self.task} | {self.export['parity']['worst']:.0e} "
            f"| {self.report['int8_linears']} | {mean:.4f} | {worst:.4f} "
            f"| {noise:.1f} | {same} |"
        )


def tasks_of(name: str) -> list[str]:
    """All tasks; for MiniLM only feature extraction, as its weights have no head."""
    return ["feature-extraction"] if name == REAL else list(TASKS)


def source(name: str, task: str, folder: Path) -> Path:
    """The transformers folder of an architecture, written to ``folder`` unless it is MiniLM's."""
    if name == REAL:
        return all_minilm_l6.model_folder()
    _random_encoders.write(name, task, folder)
    return folder


def run_all(name: str, task: str, work: Path) -> Row:
    """Export, compile, load, run."""
    folder = source(name, task, work / "torch")
    exported, compiled = work / "onnx", work / "int8"
    run("export", str(folder), "-o", str(exported))
    data = ("--data", str(SENTENCES), "--no-bench", "--force")
    run("compile", str(exported), "-o", str(compiled), *data, "--search-time", "0")
    same = None
    if importlib.util.find_spec("optimum") is not None:
        answers = [answer(task, place) for place in (exported, compiled)]
        same = sum(a == b for a, b in zip(*answers, strict=True))
    report = json.loads((compiled / "model.report.json").read_text(encoding="utf-8"))
    manifest = json.loads((exported / "qcompile.json").read_text(encoding="utf-8"))
    return Row(name, task, report, manifest["export"], same)


def run(*args: str) -> None:
    """Run a command of qcompile in a separate process, as a user would."""
    command = [sys.executable, "-m", "qcompile.commands.cli", *args, "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"qcompile {' '.join(args)}: {done.stderr.strip()}", done.returncode)


def answer(task: str, folder: Path) -> list[Any]:
    """A pipeline's answers for the last sentences, with the folder's model."""
    transformers, optimum = need("transformers"), need("optimum.onnxruntime")
    transformers.logging.set_verbosity_error()
    model = getattr(optimum, ORT_CLASSES[task]).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer)
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()[-PROBES:]
    if task == "question-answering":
        return [pipe(question="Who is it?", context=s)["answer"] for s in sentences]
    found = [pipe(s) for s in sentences]
    if task == "token-classification":
        return [[token["entity"] for token in tokens] for tokens in found]
    if task == "text-classification":
        return [labels[0]["label"] for labels in found]
    return nearest(found)


def nearest(features: list[Any]) -> list[int]:
    """For each sentence, which other one has the nearest mean of its tokens' vectors."""
    import numpy as np

    means = np.stack([np.asarray(f[0]).mean(axis=0) for f in features])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosines = means @ means.T
    np.fill_diagonal(cosines, -1)
    return [int(i) for i in cosines.argmax(axis=1)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [*ARCHITECTURES, REAL]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--task", choices=list(TASKS), help="only this one")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(names))
    if unknown:
        fail(f"unknown architecture {unknown[0]!r}, expected one of {', '.join(names)}")
    print(
        "| architecture | task | export to torch | int8 linear layers | cosine, mean | worst "
        "| SQNR dB | same |"
    )
    print("|---|---|---|---|---|---|---|---|")
    routes = set()
    for name in args.names or names:
        for task in tasks_of(name) if args.task is None else [args.task]:
            work = Path(tempfile.mkdtemp())
            try:
                row = run_all(name, task, work)
                routes.add(row.export["route"])
                print(row.text(), flush=True)
            finally:
                shutil.rmtree(work)
    versions = (f"{name} {metadata.version(name)}" for name in ("transformers", "onnxruntime"))
    print(f"\n{', '.join(sorted(routes))}; {', '.join(versions)}")


if __name__ == "__main__":
    main()
