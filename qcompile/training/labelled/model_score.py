"""The score of a model that is run, not trained, on labelled text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.data.feeds import Feed, input_specs
from qcompile.data.text import DEFAULT_LENGTH
from qcompile.data.tokenizer import TextTokenizer
from qcompile.errors import TrainingError
from qcompile.ir import Graph, is_float, shape_of
from qcompile.ir.pooling import EMBEDDING
from qcompile.quant import Array
from qcompile.training.labelled.labelled_data import LabelledData
from qcompile.training.labelled.metrics import Meter, Score
from qcompile.training.labelled.task import task_of

_ANSWERS = ("logits", EMBEDDING, "last_hidden_state", "token_embeddings")


def answering_output(graph: Graph) -> Any:
    """The output that answers: logits, else an embedding, else the first of floats.

    Raises TrainingError where no output is float.
    """
    found = {t.name: t for t in graph.outputs if is_float(t)}
    if not found:
        raise TrainingError("the model has no float output to train")
    return next((found[n] for n in _ANSWERS if n in found), next(iter(found.values())))


@dataclass(frozen=True)
class LabelledScorer:
    """Scores models by the labels of ``data``; ``output``: the name of the one that answers."""

    output: str
    data: LabelledData

    @classmethod
    def open(
        cls,
        path: Path,
        graph: Graph,
        config: Mapping[str, Any],
        tokenizer: Path,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        columns: Sequence[str] = (),
        samples: int | None = None,
    ) -> LabelledScorer:
        """The labelled texts of a file, for the task of a model with this config.json.

        ``samples``: the first of the file, so many; None for all.

        Raises TrainingError for a model without labels, DataError for a row that does not fit.
        """
        output = answering_output(graph)
        shape = shape_of(output)
        task = task_of(config, output.name, None if shape is None else tuple(shape))
        if task.kind == "embedding":
            raise TrainingError(f"output {output.name!r} is an embedding, which has no labels")
        texts = LabelledData(
            path,
            task,
            TextTokenizer(tokenizer),
            input_specs(graph),
            batch_size=batch_size,
            longest=max_length or DEFAULT_LENGTH,
            columns=columns,
            most=samples,
        )
        return cls(output.name, texts)

    def score(self, run: Callable[[Feed], Mapping[str, Array]]) -> Score:
        """The metric of the task on all of the data, for a model that ``run`` runs.

        Raises TrainingError where its output does not fit the task.
        """
        meter = Meter(self.data.task, labelled=True)
        for batch in self.data.ordered():
            assert batch.targets is not None  # the data is labelled
            own = slice(batch.count)
            meter.update(run(batch.feed)[self.output][own], batch.mask[own], batch.targets[own])
        return meter.score()
