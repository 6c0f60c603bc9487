"""Feeds from text: sentences are tokenized, sorted by length and padded per batch.

Sorting reduces padding: a batch has sentences of similar length. The batches come in a fixed
shuffled order, so that any part of them (held out, or the first few) has short and long sentences.

| input | holds |
|---|---|
| ``input_ids``, ``token_type_ids`` | what the tokenizer gives, padded |
| ``attention_mask`` | 1, and 0 for padding |
| ``position_ids`` | the number of the token in its row, counted without padding |

Positions are counted as transformers counts them for decoders and for RoBERTa, by the sums of the
mask; where padding is on the right, this is what other models count too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

import numpy as np

from qcompile.data.feeds import Feed, InputSpec
from qcompile.data.npz import batch_of
from qcompile.data.tokenizer import Padding, Sentence, Tokens
from qcompile.errors import DataError, ModelError
from qcompile.ir.analysis.data_path import MASK
from qcompile.quant import Array

IDS, TYPES, POSITIONS = "input_ids", "token_type_ids", "position_ids"
MADE = (IDS, MASK, TYPES, POSITIONS)
FORMATS = (".csv", ".jsonl", ".txt")
TABLES = (".csv", ".jsonl")  # of the formats, those with columns or fields
TEXT_COLUMNS = ({"text"}, {"text_a", "text_b"}, {"tokens"})  # without --text-columns, any of these
_OR_TABLES = " or ".join(TABLES)
DEFAULT_SAMPLES, DEFAULT_LENGTH = 256, 128
LONGEST_LINE = 1 << 20
_FIELDS = "'text', or 'text_a' and 'text_b' (--text-columns names others)"

# A line of text or of .jsonl, not parsed; or the fields of a row of .csv.
RawRow: TypeAlias = str | Mapping[str, Any]
# Runs a feed; None where the model takes it, else its error.
Takes: TypeAlias = Callable[[Feed], ModelError | None]


def read_sentences(
    path: Path, limit: int, seed: int | None = None, columns: Sequence[str] = ()
) -> list[Sentence]:
    """The first sentences of a .txt (one per line), .jsonl or .csv (by header) file, UTF-8.

    ``seed``: a random sample of all of them instead, in the order of the file. ``columns``: as for
    ``sentence_of``. Blank lines do not count. Raises DataError, with the line, for what is
    malformed.
    """
    check_columns(columns, path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            name, suffix = str(path), path.suffix.lower()
            rows = (placed_row(suffix, name, *row) for row in raw_rows(suffix, name, file))
            texts = (sentence_of(row.read(), row.where, columns) for row in rows)
            found = sample_of(texts, limit, seed)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    if not found:
        raise DataError(f"{path} holds no text, expected at least one line")
    return found


def check_columns(columns: Sequence[str], path: Path | None = None) -> None:
    """Raises DataError unless these name one column or two of a file that has columns."""
    if path is not None and columns and path.suffix.lower() not in TABLES:
        raise DataError(f"{path} has no columns, which --text-columns names: expected {_OR_TABLES}")
    if len(columns) > 2 or len(set(columns)) < len(columns):
        named = ", ".join(columns)
        raise DataError(f"text columns {named}: expected one name, or two names of a pair of texts")


def sample_of(sentences: Iterator[Sentence], limit: int, seed: int | None) -> list[Sentence]:
    """The first sentences; with a seed a random sample of all."""
    return [*islice(sentences, limit)] if seed is None else _drawn(sentences, limit, seed)


def _drawn(sentences: Iterator[Sentence], limit: int, seed: int) -> list[Sentence]:
    """Reservoir sampling (Vitter 1985, algorithm R): of a file of any size, ``limit`` are kept."""
    rng, kept = np.random.default_rng(seed), [*enumerate(islice(sentences, limit))]
    for index, sentence in enumerate(sentences, limit):
        place = int(rng.integers(index + 1))
        if place < limit:
            kept[place] = index, sentence
    return [sentence for _, sentence in sorted(kept)]


class PlacedRow(NamedTuple):
    """A row of a file: the place by which errors name it, and the function that parses it.

    ``read`` raises DataError for a row that is malformed.
    """

    where: str
    read: Callable[[], Mapping[str, Any]]


def raw_rows(suffix: str, name: str, file: TextIO) -> Iterator[tuple[int, RawRow]]:
    """The rows of an open .txt, .jsonl or .csv file, ``name`` in errors, and the lines that they
    end in; blank lines do not count. Millions may be passed over before one is made a PlacedRow.

    Raises DataError for a line that is too long, and for a .csv that is malformed.
    """
    lines = _lines(name, file)
    if suffix == ".csv":
        return _csv_rows(name, lines)
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def placed_row(suffix: str, name: str, number: int, raw: RawRow) -> PlacedRow:
    """A row of ``raw_rows`` with its place."""
    where = f"{name}, line {number}"
    if not isinstance(raw, str):
        return PlacedRow(where, partial(dict, raw))
    return PlacedRow(where, partial(json_row if suffix == ".jsonl" else _text_row, raw, where))


def _lines(name: str, file: TextIO) -> Iterator[str]:
    """The lines; raises DataError for one that is too long, before it is read into memory."""
    number = 1
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{name}, line {number}: over {LONGEST_LINE} characters")
        yield line
        number += 1


def _text_row(line: str, _where: str) -> Mapping[str, Any]:
    return {"text": line.strip()}


def json_row(line: str, where: object) -> Mapping[str, Any]:
    """The object on a line. Raises DataError, which begins with ``where``."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON: {e}") from e
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object")
    return row


def _csv_rows(name: str, lines: Iterator[str]) -> Iterator[tuple[int, RawRow]]:
    rows = csv.DictReader(lines)
    try:
        rows.fieldnames = [column.strip() for column in rows.fieldnames or ()]
        for row in rows:
            yield rows.line_num, row
    except csv.Error as e:
        raise DataError(f"{name}, line {rows.line_num}: not CSV: {e}") from e


def text_fields(names: Sequence[str], where: str, columns: Sequence[str] = ()) -> list[str]:
    """The fields, of those of a table, that ``sentence_of`` reads.

    Raises DataError, which starts with ``where``, if the text is not among them.
    """
    for name in columns:
        if name not in names:
            raise _missing(names, where, repr(name))
    if not columns and not any(usual <= {*names} for usual in TEXT_COLUMNS):
        raise _missing(names, where, _FIELDS)
    return [name for name in columns or chain(*TEXT_COLUMNS) if name in names]


def sentence_of(row: Mapping[str, Any], where: str, columns: Sequence[str] = ()) -> Sentence:
    """The text of a row, or its pair of texts. Raises DataError, which starts with ``where``.

    ``columns``: the names of the fields that hold the text, or the pair; by default ``text``, or
    ``text_a`` and ``text_b``, or a list of words called ``tokens``.
    """
    if not columns and "text" not in row and _are_words(row.get("tokens")):
        return (" ".join(row["tokens"]),)
    names = columns or (("text_a", "text_b") if _is_pair(row) else ("text",))
    return tuple(_text(row, name, where, _FIELDS if not columns else repr(name)) for name in names)


def _is_pair(row: Mapping[str, Any]) -> bool:
    return row.get("text") is None and not {"text_a", "text_b"}.isdisjoint(row)


def _are_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _text(row: Mapping[str, Any], name: str, where: str, expected: str) -> str:
    value = row.get(name)
    if value is None and name in row:
        raise DataError(f"{where}: field {name!r} is empty, expected a string")
    if value is None:
        raise _missing(row, where, expected)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is {type(value).__name__}, expected a string")
    return value


def _missing(found: Iterable[str], where: str, expected: str) -> DataError:
    had = ", ".join(map(str, found)) or "nothing"
    return DataError(f"{where}: no field {expected}; found {had}")


def check_inputs(inputs: Sequence[InputSpec]) -> None:
    """Raises DataError where an input cannot be made from text, or is of no fitting type."""
    for spec in inputs:
        if spec.name not in MADE:
            raise DataError(
                f"input {spec.name!r} cannot be made from text, "
                f"expected {', '.join(MADE)} only: give .npz data or a function"
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
        yield feed_of(chosen, inputs, padding, width or max(1, *(len(r.ids) for r in chosen)))


def longest_taken(
    row: Tokens, inputs: Sequence[InputSpec], padding: Padding, takes: Takes
) -> int | None:
    """Tokens of the longest beginning of a row that the model takes, None where it takes all.

    0 where it takes none, or where it takes the whole row with one token in all places: then the
    length is not wrong, but a token that the model lacks. A fixed width counts as if the row
    had it. Position tables end somewhere, so the length is found by bisection.
    """
    batch, is_fixed = batch_of(inputs, None)
    rows = [row] * (batch if is_fixed else 1)

    def is_taken(length: int) -> bool:
        return takes(feed_of(rows, inputs, padding, length)) is None

    taken, refused = 0, fixed_width(inputs) or len(row.ids)
    if is_taken(refused):
        return None
    alike = replace(row, ids=[row.ids[0]] * len(row.ids))
    if takes(feed_of([alike] * len(rows), inputs, padding, refused)) is None:
        return 0
    while refused - taken > 1:
        middle = (taken + refused) // 2
        if is_taken(middle):
            taken = middle
        else:
            refused = middle
    return taken


def feed_of(
    rows: Sequence[Tokens], inputs: Sequence[InputSpec], padding: Padding, width: int
) -> Feed:
    """One feed of these rows: the declared inputs, [rows, width] each; longer rows are cut."""
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
    counted = np.cumsum(made[MASK], axis=1) + padding.before_first
    made[POSITIONS] = np.where(made[MASK], counted, max(padding.before_first, 0))
    return {spec.name: made[spec.name].astype(spec.dtype) for spec in inputs}
