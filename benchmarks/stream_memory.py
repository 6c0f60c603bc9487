"""What it costs in memory and time to draw a sample from a long stream, in each format.

    python -m benchmarks.stream_memory FOLDER --tokenizer DIR [--rows 1000000] [--samples 2000]

Writes the same numbered sentences in each format into FOLDER, unless they are there, then opens
each in a process of its own, as ``compile --data`` does, and prints the peak of its resident memory
as JSON. ``before_mb`` is that of the process with qcompile imported. ``rows`` is a digest of the
texts that were drawn, which must be the same for all formats.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from qcompile.data.feeds import InputSpec, sample_count
from qcompile.data.open_data import SENTENCES, open_data
from qcompile.data.streams.stream import open_stream, sampled_texts
from qcompile.system.memory import resident_memory

_TEXT = [
    InputSpec(name, np.dtype(np.int64), ("b", "s")) for name in ("input_ids", "attention_mask")
]
_AT_ONCE = 10_000  # rows written at a time


def texts(rows: int) -> Iterator[list[str]]:
    """The sentences that ship with qcompile, over and over, each with its number."""
    sentences = cycle(SENTENCES.read_text(encoding="utf-8").splitlines())
    numbered = (f"{number} {sentence[:60]}".strip() for number, sentence in enumerate(sentences))
    left = islice(numbered, rows)
    while chunk := list(islice(left, _AT_ONCE)):
        yield chunk


def write_parquet(path: Path, rows: int) -> None:
    """Row groups of 10,000 rows."""
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetWriter(path, pa.schema([("text", pa.string())])) as file:
        for chunk in texts(rows):
            file.write_table(pa.table({"text": chunk}))


def write_arrow(path: Path, rows: int) -> None:
    """Arrow's stream format, as datasets writes it."""
    import pyarrow as pa

    schema = pa.schema([("text", pa.string())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for chunk in texts(rows):
            stream.write_table(pa.table({"text": chunk}), max_chunksize=1000)


def write_jsonl(path: Path, rows: int) -> None:
    """A line for each row, compressed by gzip."""
    with gzip.open(path, "wt", compresslevel=1) as file:
        for chunk in texts(rows):
            file.writelines(json.dumps({"text": text}) + "\n" for text in chunk)


def write_txt(path: Path, rows: int) -> None:
    """A line for each row, compressed by Zstandard."""
    import pyarrow as pa

    with pa.CompressedOutputStream(str(path), "zstd") as file:
        for chunk in texts(rows):
            file.write("".join(f"{text}\n" for text in chunk).encode())


FORMATS: dict[str, Callable[[Path, int], None]] = {
    "rows.parquet": write_parquet,
    "rows.arrow": write_arrow,
    "rows.jsonl.gz": write_jsonl,
    "rows.txt.zst": write_txt,
}


def child(args: argparse.Namespace) -> None:
    """Open one file and print the figures as JSON."""
    before, start = resident_memory().now, time.perf_counter()
    data = str(args.folder / args.child)
    feeds = open_data(data, _TEXT, tokenizer=args.tokenizer, samples=args.samples, seed=args.seed)
    count = sum(map(sample_count, feeds))
    seconds, peak = time.perf_counter() - start, resident_memory().peak
    stream = open_stream(data)
    assert stream is not None
    drawn = sampled_texts(stream, args.samples, args.seed, ())
    figures = {
        "data": args.child,
        "file_mb": round(Path(data).stat().st_size / 1e6, 1),
        "samples": count,
        "note": drawn.note,
        "seconds": round(seconds, 1),
        "before_mb": round(before / 1e6),
        "peak_mb": round(peak / 1e6),
        "rows": hashlib.sha256(repr(drawn.texts).encode()).hexdigest()[:12],
    }
    print(json.dumps(figures))


def main() -> None:
    """Print a line of JSON for each format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, write in FORMATS.items():
        if not (args.folder / name).exists():
            write(args.folder / name, args.rows)
        command = [sys.executable, "-m", "benchmarks.stream_memory", *sys.argv[1:]]
        subprocess.run([*command, "--child", name], check=True)


if __name__ == "__main__":
    main()
