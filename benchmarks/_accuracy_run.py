"""The float model, the data and the measures of benchmarks/accuracy.py, each read or run once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.embedding_closeness import Floats, batches, embed, feed_of, sentences, spearman
from models._common import fail
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.data.text import read_sentences
from qcompile.ir.model_io.external_data import external_bytes
from qcompile.ir.model_io.read_model import load
from qcompile.runtime.evaluation.closeness import cosine
from qcompile.runtime.session import Session, SessionOptions


@dataclass(frozen=True)
class Figures:
    """The measurements of one model."""

    spearman: float
    cosine_mean: float
    cosine_worst: float
    bytes: int


@dataclass
class Bench:
    """The float model and the data, read once; embeddings only where they are needed."""

    model: Path
    data: Path
    calibration: Path
    tokenizer: Path
    samples: int
    threads: int

    @cached_property
    def key(self) -> str:
        """Identifies the files that figures are measured with."""
        files = (self.model, self.data, self.tokenizer / "tokenizer.json")
        return digest([file_digest(file) for file in files])

    @cached_property
    def source(self) -> str:
        """Identifies the files that models are compiled from."""
        return digest([file_digest(self.model), file_digest(self.calibration), self.samples])

    @cached_property
    def peer_feeds(self) -> list[Feed]:
        """The calibration sentences one by one, and so without padding."""
        specs = input_specs(load(self.model))
        settings: dict[str, Any] = {"tokenizer": self.tokenizer, "samples": self.samples}
        return list(open_data(self.calibration, specs, batch_size=1, **settings))

    @cached_property
    def texts(self) -> tuple[list[str], list[float]]:
        """The sentences of all pairs, and the pairs' scores."""
        try:
            return sentences(self.data)
        except (KeyError, TypeError, ValueError) as error:
            fail(f"{self.data}: expected JSON lines with text_a, text_b and score; {error!r}")

    @cached_property
    def feeds(self) -> list[tuple[list[int], Feed]]:
        """The batches of benchmarks/embedding_closeness.py."""
        from tokenizers import Tokenizer

        engine = Tokenizer.from_file(str(self.tokenizer / "tokenizer.json"))
        engine.enable_padding()
        engine.enable_truncation(128)
        texts, specs = self.texts[0], input_specs(load(self.model))
        return [(rows, feed_of([texts[i] for i in rows], specs, engine)) for rows in batches(texts)]

    @cached_property
    def reference(self) -> Floats:
        """Embeddings of the float model."""
        return self.embeddings(self.model)

    def embeddings(self, model: Path) -> Floats:
        """Mean-pooled embeddings of all sentences of the data, float64 [sentences, hidden]."""
        session = Session(model, SessionOptions(threads=self.threads, exact=False))
        return embed(session, self.feeds, len(self.texts[0]))

    def figures(self, model: Path) -> Figures:
        """Spearman, closeness to the float model, and size."""
        vectors = self.reference if model == self.model else self.embeddings(model)
        close = [cosine(x, y) for x, y in zip(self.reference, vectors, strict=True)]
        pairs = [cosine(x, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
        proto = onnx.load(model, load_external_data=False)
        return Figures(
            spearman(np.array(pairs), np.array(self.texts[1])),
            float(np.mean(close)),
            float(np.min(close)),
            model.stat().st_size + external_bytes(proto),
        )


def digest(value: Any) -> str:
    """Short hash of a value that JSON can represent."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_calibration(source: Path, samples: int, folder: Path) -> Path:
    """The first sentences, those of a pair one after the other, as a file of single sentences."""
    rows = read_sentences(source, samples)
    texts = [text for row in rows for text in row][:samples]
    if not texts:
        fail(f"{source} holds no text")
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
