"""How close compiled sentence encoders stay to the float one, by the length of the text.

    python -m benchmarks.text_lengths FLOAT.onnx OTHER.onnx ...
        --data dev.jsonl --tokenizer DIR [--lengths 16,128,512] [--texts 12]

Texts are sentences of ``--data`` (JSON lines with text_a and text_b) in a row, each text cut after
as many tokens. Printed: cosine of mean-pooled embeddings to the float model's, mean and worst.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.embedding_closeness import embed, feed_of, sentences
from qcompile.data.feeds import Feed, input_specs
from qcompile.ir.model_io.read_model import load
from qcompile.runtime.evaluation.closeness import cosine
from qcompile.runtime.session import Session


def texts_of(length: int, count: int, parts: list[str]) -> list[str]:
    """Texts of at least ``length`` words, from disjoint ranges of the sentences where they do."""
    found = []
    step = max(1, len(parts) // count)
    for first in range(0, step * count, step):
        words: list[str] = []
        for part in parts[first:] + parts[:first]:
            if len(words) >= length:
                break
            words += part.split()
        found.append(" ".join(words))
    return found


def measure(
    models: list[Path], data: Path, tokenizer: Path, lengths: list[int], count: int
) -> list[list[str]]:
    """A row for each length: mean and worst cosine of each model but the first, the reference."""
    from tokenizers import Tokenizer

    engine: Any = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    engine.enable_padding()
    parts, _ = sentences(data)
    specs = input_specs(load(models[0]))
    feeds: list[tuple[list[int], Feed]] = []
    for length in lengths:
        engine.enable_truncation(length)
        made = texts_of(length, count, parts)
        feeds += [([len(feeds) + i], feed_of([t], specs, engine)) for i, t in enumerate(made)]
    found = [embed(Session(model), feeds, len(feeds)) for model in models]
    rows = []
    for i, length in enumerate(lengths):
        part = slice(i * count, (i + 1) * count)
        near = [
            [cosine(a, b) for a, b in zip(found[0][part], other[part], strict=True)]
            for other in found[1:]
        ]
        rows.append([str(length), *(f"{sum(n) / count:.5f} / {min(n):.4f}" for n in near)])
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--lengths", default="16,64,128,256,512")
    parser.add_argument("--texts", type=int, default=12, help="of each length")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    print("| tokens | " + " | ".join(m.name for m in args.models[1:]) + " |")
    print("|---|" + "---|" * len(args.models[1:]))
    for row in measure(args.models, args.data, args.tokenizer, lengths, args.texts):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
