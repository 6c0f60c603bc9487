"""Feeds from text: sentences are tokenized, sorted by length and padded per batch.

Sorting reduces padding: a batch has sentences of similar length. The batches come in a fixed
shuffled order, so that any part of them (held out, or the first few) has short and long sentences.
No torch, no transformers: ``tokenizer.json`` is read by the tokenizers package.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from qcompile.data.feeds import Feed, InputSpec
from qcompile.data.npz import batch_of
from qcompile.errors import DataError
from qcompile.ir.analysis.data_path import MASK
from qcompile.quant import Array

IDS, TYPES = "input_ids", "token_type_ids"
FORMATS = (".csv", ".jsonl", ".txt")
DEFAULT_SAMPLES = 256
_LONGEST_LINE = 1 << 20
_LARGEST_TOKENIZER = 1 << 28
_FIELDS = "'text', or 'text_a' and 'text_b'"
_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")

Sentence = tuple[str, ...]  # one text, or a pair of texts


@dataclass(frozen=True)
class Tokens:
    """One tokenized sentence: ids and segment ids, of equal length, special tokens included."""

    ids: Sequence[int]
    types: Sequence[int]


@dataclass(frozen=True)
class Padding:
    """What fills a row up to its batch's width, and on which side."""

    token: int = 0
    segment: int = 0
    left: bool = False


def read_sentences(path: Path, limit: int) -> list[Sentence]:
    """The first sentences of a .txt (one per line), .jsonl or .csv (by header) file, UTF-8.

    Blank lines do not count. Raises DataError, with the line, for what is malformed.
    """
    reader = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}[path.suffix.lower()]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = list(islice(reader(path, _lines(path, file)), limit))
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    if not found:
        raise DataError(f"{path} holds no sentences, expected at least one")
    return found


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines; raises DataError for one that is too long, before it is read into memory."""
    number = 1
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise DataError(f"{path}, line {number}: over {_LONGEST_LINE} characters")
        yield line
        number += 1


def _txt(path: Path, lines: Iterator[str]) -> Iterator[Sentence]:
    return ((line.strip(),) for line in lines if line.strip())


def _jsonl(path: Path, lines: Iterator[str]) -> Iterator[Sentence]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: not JSON: {e}") from e
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {type(row).__name__}, expected an object")
        yield _sentence(row, where)


def _csv(path: Path, lines: Iterator[str]) -> Iterator[Sentence]:
    rows = csv.DictReader(lines)
    try:
        for row in rows:
            yield _sentence(row, f"{path}, line {rows.line_num}")
    except csv.Error as e:
        raise DataError(f"{path}, line {rows.line_num}: not CSV: {e}") from e


def _sentence(row: dict[str, Any], where: str) -> Sentence:
    names = ("text",) if row.get("text") is not None else ("text_a", "text_b")
    for name in names:
        if row.get(name) is None:
            had = ", ".join(str(key) for key in row) or "nothing"
            raise DataError(f"{where}: no field {_FIELDS}; found {had}")
        if not isinstance(row[name], str):
            found = type(row[name]).__name__
            raise DataError(f"{where}: field {name!r} is {found}, expected a string")
    return tuple(row[name] for name in names)


def tokenize(
    sentences: Sequence[Sentence], tokenizer: Path, max_length: int
) -> tuple[list[Tokens], Padding]:
    """Tokens of each sentence, truncated to ``max_length``, and the tokenizer's padding.

    ``tokenizer`` is a folder with tokenizer.json, or that file. Raises DataError.
    """
    file = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"tokenizer {str(tokenizer)!r} holds no tokenizer.json")
    if file.stat().st_size > _LARGEST_TOKENIZER:
        raise DataError(f"{file} is no tokenizer: {file.stat().st_size} bytes")
    # Imported here: 50 ms that commands without text need not pay.
    from tokenizers import Tokenizer

    with _errors_as(f"{file} is not a tokenizer"):
        engine = Tokenizer.from_file(str(file))
    padding = _padding(engine, file.parent)
    special = engine.num_special_tokens_to_add(any(len(s) > 1 for s in sentences))
    if max_length <= special:
        raise DataError(f"length {max_length} leaves no room: {special} tokens are special")
    engine.no_padding()
    engine.enable_truncation(max_length)
    with _errors_as(f"{file} cannot tokenize the text"):
        encoded = engine.encode_batch([s if len(s) > 1 else s[0] for s in sentences])
    return [Tokens(e.ids, e.type_ids) for e in encoded], padding


@contextmanager
def _errors_as(what: str) -> Iterator[None]:
    """Turn any exception of the tokenizers package into a DataError.

    It raises bare Exception, and where its Rust code panics only a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise DataError(f"{what}: {(str(e) or type(e).__name__).splitlines()[0]}") from e


def _padding(engine: Any, folder: Path) -> Padding:
    """The padding of tokenizer.json, else of the other files in its folder, else a common pad
    token's id.
    """
    own = engine.padding
    if own is not None:
        return Padding(own["pad_id"], own["pad_type_id"], own["direction"] == "left")
    config = _json(folder / "tokenizer_config.json")
    named = config.get("pad_token") or _json(folder / "special_tokens_map.json").get("pad_token")
    if isinstance(named, dict):
        named = named.get("content")
    ids = (engine.token_to_id(t) for t in (named, *_PAD_TOKENS) if isinstance(t, str))
    # Padded positions are masked out, so a tokenizer that has no pad token may use any id.
    token = next((i for i in ids if i is not None), 0)
    return Padding(token, left=config.get("padding_side") == "left")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_inputs(inputs: Sequence[InputSpec]) -> None:
    """Raises DataError where an input cannot be made from text, or is of no fitting type."""
    for spec in inputs:
        if spec.name not in (IDS, MASK, TYPES):
            raise DataError(
                f"input {spec.name!r} cannot be made from text, "
                f"expected {IDS}, {MASK}, {TYPES} only: give .npz data or a function"
            )
        if spec.shape is not None and len(spec.shape) != 2:
            raise DataError(f"input {spec.name!r} has rank {len(spec.shape)}, expected 2 for text")
        if spec.name != MASK and (spec.dtype.kind not in "iu" or spec.dtype.itemsize < 4):
            raise DataError(f"input {spec.name!r} is {spec.dtype}, expected int32 or int64")
    if not any(spec.name == IDS for spec in inputs):
        had = ", ".join(spec.name for spec in inputs) or "no inputs"
        raise DataError(f"the model declares {had}, expected {IDS} for text")


def fixed_width(inputs: Sequence[InputSpec]) -> int | None:
    """The sequence length that the model fixes, None where it does not."""
    return next((d for spec in inputs if isinstance(d := spec.dim(1), int)), None)


def token_feeds(
    rows: Sequence[Tokens],
    inputs: Sequence[InputSpec],
    padding: Padding,
    batch_size: int | None,
) -> Iterator[Feed]:
    """Feeds of the declared inputs, [batch, width] each, in their declared types.

    The width is the model's where it fixes one, else the longest row's. A last batch that is short
    of the model's fixed size is filled up by repeating its rows.
    """
    batch, is_fixed = batch_of(inputs, batch_size)
    ordered = sorted(rows, key=lambda row: len(row.ids))
    batches = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    width = fixed_width(inputs)
    for index in np.random.default_rng(0).permutation(len(batches)):
        chosen = batches[index]
        if is_fixed:
            chosen = [chosen[i % len(chosen)] for i in range(batch)]
        yield _feed(chosen, inputs, padding, width or max(1, *(len(r.ids) for r in chosen)))


def _feed(
    rows: Sequence[Tokens], inputs: Sequence[InputSpec], padding: Padding, width: int
) -> Feed:
    shape = (len(rows), width)
    made: dict[str, Array] = {
        IDS: np.full(shape, padding.token, np.int64),
        MASK: np.zeros(shape, np.int64),
        TYPES: np.full(shape, padding.segment, np.int64),
    }
    for i, row in enumerate(rows):
        count = min(len(row.ids), width)
        span = slice(width - count, width) if padding.left else slice(count)
        made[IDS][i, span] = row.ids[:count]
        made[MASK][i, span] = 1
        made[TYPES][i, span] = row.types[:count]
    return {spec.name: made[spec.name].astype(spec.dtype) for spec in inputs}
