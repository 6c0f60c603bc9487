"""Pooling inside the compiled model against outside: how equal, and which is faster.

    python -m benchmarks.pooling MODEL.onnx --data sentences.txt --tokenizer DIR
        [--mode dynamic] [--threads 1] [--rounds 40] [--sentences 32]

Compiles the model without pooling and with each kind, normalized, and runs them on one batch of the
first sentences in alternating rounds. "difference" is the largest one of any value to the same
integers pooled outside, in numpy; "latency" the best round, and its ratio to the states alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import benchmarks.embedding_closeness as embeddings
import qcompile
from qcompile.compiler.stages.options import CompileOptions
from qcompile.data.feeds import Feed, input_specs
from qcompile.ir.model_io.read_model import load
from qcompile.ir.pooling import EMBEDDING, PoolingKind
from qcompile.runtime.session import Session, SessionOptions
from qcompile.targets.target import Mode

KINDS: tuple[PoolingKind, ...] = ("mean", "max", "cls")
Floats = npt.NDArray[Any]


def pooled_outside(states: Floats, mask: Floats, kind: PoolingKind) -> Floats:
    """Normalized embeddings [batch, hidden] of padding on the right."""
    marks = mask[..., None].astype(states.dtype)
    if kind == "mean":
        vectors = (states * marks).sum(1) / marks.sum(1)
    else:
        vectors = np.where(marks == 0, -np.inf, states).max(1) if kind == "max" else states[:, 0]
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def measure(
    model: Path, data: Path, feed: Feed, mode: Mode, tokenizer: Path, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """One row for the states and one for each kind of pooling."""
    options = CompileOptions(tokenizer=tokenizer, bench=False, verify=False, force=True)
    sessions: dict[str, Session] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in (None, *KINDS):
            given = data if mode == "static" else None
            result = qcompile.compile(
                model, given, mode=mode, pooling=kind, normalize=bool(kind), options=options
            )
            path = Path(scratch) / f"{kind}.onnx"
            result.save(path)
            sessions[kind or "states"] = Session(path, SessionOptions(threads=threads))
    best = dict.fromkeys(sessions, float("inf"))
    for _ in range(rounds):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(feed)
            best[name] = min(best[name], time.perf_counter() - start)
    states = next(v for v in sessions["states"].run(feed).values() if v.ndim == 3)
    rows: list[dict[str, Any]] = [{"pooling": "none: states alone", "seconds": best["states"]}]
    for kind in KINDS:
        outside = pooled_outside(states, feed["attention_mask"], kind)
        inside = sessions[kind].run(feed)[EMBEDDING]
        difference = float(np.abs(inside - outside).max())
        rows.append({"pooling": kind, "seconds": best[kind], "difference": difference})
    return rows


def main() -> None:
    """Print a table."""
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--mode", default="dynamic", choices=("static", "dynamic", "float"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sentences", type=int, default=32)
    args = parser.parse_args()
    engine = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    engine.enable_padding()
    engine.enable_truncation(128)
    texts = args.data.read_text(encoding="utf-8").splitlines()[: args.sentences]
    feed = embeddings.feed_of(texts, input_specs(load(args.model)), engine)
    rows = measure(
        args.model, args.data, feed, args.mode, args.tokenizer, args.threads, args.rounds
    )
    length, real = feed["attention_mask"].shape[1], int(feed["attention_mask"].sum())
    print(f"{len(texts)} sentences of up to {length} tokens, {real} in all\n")
    print("| pooling | difference | latency in ms | ratio |\n|---|---|---|---|")
    for row in rows:
        difference = f"{row['difference']:.0e}" if "difference" in row else "-"
        ratio = row["seconds"] / rows[0]["seconds"]
        print(f"| {row['pooling']} | {difference} | {row['seconds'] * 1e3:.2f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
