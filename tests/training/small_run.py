"""A small training run for tests: a tokenizer, labelled text, a module and its teacher."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from qcompile.data.feeds import InputSpec
from qcompile.data.tokenizer import TextTokenizer
from qcompile.training.labelled.labelled_data import LabelledData
from qcompile.training.labelled.task import Task
from qcompile.training.loop.objectives import Distillation, Objective
from qcompile.training.loop.schedule import Schedule
from qcompile.training.loop.training_loop import Trained, Trainee, train

INPUTS = tuple(
    InputSpec(name, np.dtype(np.int64), ("batch", "seq"))
    for name in ("input_ids", "attention_mask", "token_type_ids")
)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", "##x")
LABELS = ("left", "right", "none")
CLASSES = Task("classification", LABELS)
Texts = Iterable[Mapping[str, object]]


def tokenizer(folder: Path) -> TextTokenizer:
    """One token a letter; x at the end of a word is a token of its own."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


def write_rows(path: Path, rows: Texts) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letters(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Texts of letters, labelled by which of the first two letters is more frequent."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        text = " ".join(rng.choice(list("abcdef"), rng.integers(1, 9)))
        a, b = text.count("a"), text.count("b")
        rows.append({"text": text, "label": LABELS[0 if a > b else 1 if b > a else 2]})
    return rows


class Classifier(nn.Module):
    """Mean of embeddings, one layer and the logits; ``scale`` stands for a learned range."""

    def __init__(self, seed: int, columns: int = len(LABELS)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(len(WORDS), 8, generator=generator))
        self.weight = nn.Parameter(torch.randn(8, columns, generator=generator) / 3)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(
        self, feed: Mapping[str, torch.Tensor], watch: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        mask = feed["attention_mask"].unsqueeze(-1).float()
        hidden = self.table[feed["input_ids"]] * self.scale.exp()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        made = {"hidden": hidden, "pooled": pooled}
        return {"logits": pooled @ self.weight, **{name: made[name] for name in watch}}


def trainee(seed: int = 1) -> Trainee:
    """A student, and a teacher with other weights."""
    student = Classifier(seed)
    weights = {"table": student.table, "weight": student.weight}
    return Trainee(student, Classifier(seed + 7), weights, {"scale": student.scale})


OBJECTIVE = Objective(CLASSES, "logits", Distillation(pairs=(("hidden", "hidden"),)))
LABELS_ALONE = Objective(CLASSES, "logits", None)
SCHEDULE = Schedule(
    epochs=2, weight_rate=3e-2, range_rate=1e-2, evaluations=2, checkpoint_seconds=0
)


def small_data(folder: Path, *, labelled: bool = True) -> tuple[LabelledData, LabelledData]:
    """Data to train and to evaluate on, in batches of 8."""
    made = tokenizer(folder)
    files = (
        write_rows(folder / "train.jsonl", letters(90)),
        write_rows(folder / "dev.jsonl", letters(40, seed=1)),
    )
    first, second = (
        LabelledData(f, CLASSES, made, INPUTS, batch_size=8, labelled=labelled) for f in files
    )
    return first, second


def run(
    folder: Path,
    state: Path | None = None,
    *,
    of: Trainee | None = None,
    schedule: Schedule = SCHEDULE,
    objective: Objective = OBJECTIVE,
    labelled: bool = True,
    **more: Any,
) -> tuple[Trained, Trainee]:
    """Train on the small data. Gives the outcome and what was trained."""
    made = of or trainee()
    data, evaluation = small_data(folder, labelled=labelled)
    cpu = torch.device("cpu")
    outcome = train(
        made, data, evaluation, objective, schedule, state=state, device=cpu, **more
    )  # fmt: skip
    return outcome, made


def values(of: Trainee) -> dict[str, list[float]]:
    """All trained numbers."""
    return {n: p.detach().reshape(-1).tolist() for n, p in of.parameters().items()}
