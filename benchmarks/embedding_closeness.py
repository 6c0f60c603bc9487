"""How close compiled sentence encoders stay to the float one: cosine of embeddings, and Spearman.

    python -m benchmarks.embedding_closeness FLOAT.onnx OTHER.onnx ...
        --data dev.jsonl --tokenizer DIR

Embeddings are the output ``sentence_embedding``, else means over tokens of the first rank-3 output,
in batches of sentences sorted by length, as in the table of docs/accuracy.md. ``--data`` is JSON
lines with text_a, text_b and score, as in STS-B: Spearman is the rank correlation of the pairs'
cosines with the scores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.data.feeds import Feed, InputSpec, input_specs
from qcompile.ir.model_io.read_model import load
from qcompile.ir.pooling import EMBEDDING
from qcompile.runtime.evaluation.closeness import cosine
from qcompile.runtime.session import Session, SessionOptions

Floats = npt.NDArray[Any]
# ONNX Runtime's own arithmetic, even where int8 sums saturate (x86 without VNNI).
DEFAULT_ARITHMETIC = SessionOptions(exact=False)


def sentences(path: Path) -> tuple[list[str], list[float]]:
    """All sentences, the first of each pair before the second, and the scores of the pairs."""
    rows = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    texts = [row[key] for row in rows for key in ("text_a", "text_b")]
    return texts, [float(row["score"]) for row in rows]


def batches(texts: list[str]) -> list[list[int]]:
    """Indices of sentences in batches of 32, shortest first."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    return [order[i : i + 32] for i in range(0, len(order), 32)]


def feed_of(texts: list[str], specs: tuple[InputSpec, ...], tokenizer: Any) -> Feed:
    """One padded batch."""
    encoded = tokenizer.encode_batch(texts)
    columns = {
        "input_ids": [e.ids for e in encoded],
        "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded],
    }
    return {s.name: np.array(columns[s.name], s.dtype) for s in specs}


def embed(session: Session, feeds: list[tuple[list[int], Feed]], count: int) -> Floats:
    """Embeddings, mean-pooled here where the model does not, float64 [count, hidden]."""
    embeddings: Floats = np.zeros((0, 0))
    for rows, feed in feeds:
        outputs = session.run(feed)
        pooled = outputs.get(EMBEDDING)
        if pooled is None:
            hidden = next(v for v in outputs.values() if v.ndim == 3 and v.dtype.kind == "f")
            mask = feed["attention_mask"][..., None].astype(np.float64)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        if embeddings.size == 0:
            embeddings = np.zeros((count, pooled.shape[1]))
        embeddings[rows] = pooled
    return embeddings


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation times 100; ties share their mean rank."""
    ranks = [_ranks(np.asarray(x)) for x in (a, b)]
    return 100 * float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Floats) -> Floats:
    """Ranks from 1 of the values, their mean where values are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: Floats = (ends - (counts - 1) / 2)[inverse]
    return middle


def measure(models: list[Path], data: Path, tokenizer: Path) -> list[dict[str, Any]]:
    """One row per model; the first model is the reference."""
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    engine.enable_padding()
    engine.enable_truncation(128)
    texts, scores = sentences(data)
    specs = input_specs(load(models[0]))
    feeds = [(rows, feed_of([texts[i] for i in rows], specs, engine)) for rows in batches(texts)]
    reference: Floats | None = None
    rows_of_table = []
    for model in models:
        vectors = embed(Session(model, DEFAULT_ARITHMETIC), feeds, len(texts))
        reference = vectors if reference is None else reference
        closeness = [cosine(x, y) for x, y in zip(reference, vectors, strict=True)]
        pairs = np.array([cosine(x, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)])
        rows_of_table.append(
            {
                "model": str(model),
                "bytes": model.stat().st_size,
                "spearman": spearman(pairs, np.array(scores)),
                "cosine_mean": float(np.mean(closeness)),
                "cosine_worst": float(np.min(closeness)),
            }
        )
    return rows_of_table


def main() -> None:
    """Print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.models, args.data, args.tokenizer)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print("| model | MB | Spearman | cosine mean | cosine worst |\n|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['model']} | {r['bytes'] / 1e6:.1f} | {r['spearman']:.2f} "
            f"| {r['cosine_mean']:.4f} | {r['cosine_worst']:.4f} |"
        )


if __name__ == "__main__":
    main()
