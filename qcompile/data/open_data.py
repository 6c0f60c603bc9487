"""Opens calibration and verification data of any format as feeds checked for one model.

| format | read as |
|---|---|
| ``x.npz`` | arrays by input name, samples on axis 0, in batches |
| a folder of .npz | each file one feed, by name |
| ``.jsonl``, ``.csv``, ``.txt`` | sentences, with a folder that holds ``tokenizer.json`` |
| ``package.module:function`` | a callable that returns feeds |
| Python, feeds | an iterable of feeds, one feed, or a callable that returns either |
| ``.parquet``, ``.arrow``, compressed text, patterns, addresses | streams (``streams/``) |
| Python, rows | texts, pairs of texts, a DataFrame, a Dataset (``python_rows.py``) |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qcompile.data.feeds import (
    Feeds,
    InputSpec,
)
from qcompile.data.npz import batch_of, check_npz, list_folder, read_batches, read_folder
from qcompile.data.python_rows import (
    Table,
    array_feeds,
    is_text,
    peek,
    sentences,
    table_of,
)
from qcompile.data.stream_feeds import column_feeds, has_inputs
from qcompile.data.streams.stream import (
    Reading,
    open_stream,
    sampled_texts,
)
from qcompile.data.text import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    FORMATS,
    TEXT_COLUMNS,
    Takes,
    check_columns,
    check_inputs,
    fixed_width,
    longest_taken,
    read_sentences,
    sample_of,
    token_feeds,
)
from qcompile.data.tokenizer import Padding, Sentence, TextTokenizer, Tokens
from qcompile.errors import DataError
from qcompile.system import user_function

Data: TypeAlias = str | Path | Mapping[str, object] | Iterable[object] | Callable[[], object]

SENTENCES = Path(__file__).parent / "samples" / "calibration.txt"
SAMPLES = SENTENCES.with_suffix(".npz")
_EXPECTED = (
    "x.npz, a folder of .npz, a .jsonl, .txt, .csv, .parquet or .arrow file, a pattern of such "
    "files (folder/*.jsonl.gz), or package.module:function"
)


def open_data(
    data: Data,
    inputs: Sequence[InputSpec],
    *,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    text_columns: Sequence[str] = (),
    takes: Takes | None = None,
    seed: int = 0,
    draw: bool = False,
    progress: Reading | None = None,
) -> Feeds:
    """Feeds that fit ``inputs``, in batches of ``batch_size`` (8; the model's, where it fixes one).

    ``samples`` ends the data after that many (text: 256, everything else: all). ``batch_size`` is
    for .npz files of samples and for text: other formats consist of feeds. ``max_length`` truncates
    text; by default the tokenizer's own limit does, and 128 tokens. ``text_columns`` names the
    columns that hold the text, or the pair, of .csv, .jsonl and tables. ``takes`` runs the model on
    text, which is cut where it takes no more. ``seed`` draws the samples of a stream, and with
    ``draw`` those of any text, since a file may be sorted by label; else text has its first rows.
    ``progress`` shows how a stream is read. Raises DataError for what can be seen without running
    through the data.
    """
    _check_numbers(samples, batch_size, max_length)
    columns = _columns(text_columns)

    def of_text(read: Callable[[], list[Sentence]], what: str) -> Feeds:
        rows, padding, note = _tokenized(what, read, inputs, tokenizer, max_length, takes)
        return _of_tokens(rows, padding, inputs, batch_size, what, note)

    most, text_seed = samples or DEFAULT_SAMPLES, seed if draw else None
    if not isinstance(data, str | Path):
        table = table_of(data)
        if table is not None and not columns and table.has(inputs):
            return _of_table(table, inputs, samples, batch_size)
        texts, feeds = _texts_or_feeds(data, table, inputs, columns)
        if texts is not None:
            return of_text(lambda: _sampled(texts, columns, most, text_seed), "data")
        _refuse_columns(columns, "data yields feeds")
        return _from_python(feeds, inputs, samples)
    stream = open_stream(data, progress)
    if stream is not None:
        if has_inputs(stream, inputs, columns):
            return column_feeds(stream, inputs, samples, batch_size, seed)
        feeds = of_text(lambda: [*sampled_texts(stream, most, seed, columns).texts], stream.name)
        feeds.drawn = sampled_texts(stream, most, seed, columns).note
        return feeds
    path = Path(data)
    if path.suffix.lower() in FORMATS and path.is_file():
        return of_text(partial(read_sentences, path, most, text_seed, columns), str(path))
    _refuse_columns(columns, f"data {str(data)!r} is no text")
    return _of_arrays(path, str(data), inputs, samples, batch_size)


def _check_numbers(samples: int | None, batch_size: int | None, max_length: int | None) -> None:
    for name, value in (("samples", samples), ("batch size", batch_size), ("length", max_length)):
        if value is not None and value < 1:
            raise DataError(f"{name} {value}: expected at least 1")


def _columns(given: Sequence[str]) -> tuple[str, ...]:
    columns = (given,) if isinstance(given, str) else tuple(given)
    check_columns(columns)
    return columns


def _refuse_columns(columns: Sequence[str], what: str) -> None:
    if columns:
        raise DataError(f"{what}, which has no text column {columns[0]!r}")


def _of_arrays(
    path: Path, name: str, inputs: Sequence[InputSpec], samples: int | None, batch_size: int | None
) -> Feeds:
    """The feeds of what is no text: a function, a folder of .npz, an .npz."""
    if not path.exists() and user_function.is_function_name(name):
        return _from_function(name, inputs, samples)
    if not path.exists():
        raise DataError(f"data {name!r} does not exist, expected {_EXPECTED}")
    if path.is_dir():
        files = list_folder(path)
        return Feeds(lambda: read_folder(files, inputs), inputs, str(path), samples=samples)
    if path.suffix.lower() != ".npz":
        raise DataError(f"data {name!r} is of no known format, expected {_EXPECTED}")
    check_npz(path, inputs, batch_size)
    return Feeds(
        lambda: read_batches(path, inputs, batch_size, samples), inputs, str(path), samples=samples
    )


def _of_table(
    table: Table, inputs: Sequence[InputSpec], samples: int | None, batch_size: int | None
) -> Feeds:
    batch_of(inputs, batch_size)
    return Feeds(
        lambda: array_feeds(table.placed_rows(), inputs, batch_size),
        inputs,
        "data",
        samples=samples,
    )


def _texts_or_feeds(
    data: object, table: Table | None, inputs: Sequence[InputSpec], columns: Sequence[str]
) -> tuple[Iterable[object] | None, object]:
    """The rows of text that Python data is, else None, and the data, of which nothing is used up.

    Raises DataError for a table without text, and for several tables."""
    if table is not None:
        table.check_text(inputs, columns)
        return table.rows(), data
    if isinstance(data, Mapping):
        if data and all(table_of(part) for part in data.values()):
            names = ", ".join(map(str, data))
            raise DataError(f"data is a dict of tables, expected one of them: {names}")
        return None, data
    if not isinstance(data, Iterable) or isinstance(data, bytes):
        return None, data
    first, items = peek(data)
    return (items if columns or is_text(first, inputs) else None), items


def _sampled(
    rows: Iterable[object], columns: Sequence[str], most: int, seed: int | None
) -> list[Sentence]:
    found = sample_of(sentences(rows, columns), most, seed)
    if not found:
        raise DataError("data holds no rows, expected at least one")
    return found


def _from_python(data: object, inputs: Sequence[InputSpec], samples: int | None) -> Feeds:
    if callable(data) and not isinstance(data, Iterable):
        what = f"function {getattr(data, '__qualname__', type(data).__name__)}"
        return Feeds(lambda: _as_feeds(data()), inputs, what, samples=samples)
    feeds = _as_feeds(data)
    is_one_pass = iter(feeds) is feeds
    return Feeds(lambda: feeds, inputs, "data", samples=samples, reusable=not is_one_pass)


def _as_feeds(found: object) -> Iterable[object]:
    """An iterable of feeds; a single dict is one feed."""
    if isinstance(found, Mapping):
        return [found]
    if not isinstance(found, Iterable) or isinstance(found, str | bytes):
        raise DataError(f"data is {type(found).__name__}, expected an iterable of feeds")
    return found


def _from_function(name: str, inputs: Sequence[InputSpec], samples: int | None) -> Feeds:
    function = user_function.find_function(name, "data")
    return Feeds(lambda: _as_feeds(function()), inputs, f"function {name}", samples=samples)


def _tokenized(
    what: str,
    read: Callable[[], list[Sentence]],
    inputs: Sequence[InputSpec],
    folder: str | Path | None,
    max_length: int | None,
    takes: Takes | None,
) -> tuple[list[Tokens], Padding, str | None]:
    """The text as tokens, no longer than model and tokenizer allow; a note where it was cut because
    the model takes no more. Raises DataError."""
    if folder is None:
        raise DataError(
            f"{what} is text and needs a tokenizer: a folder holding tokenizer.json (--tokenizer); "
            "the model's own folder has none"
        )
    check_inputs(inputs)
    tokenizer, texts = TextTokenizer(Path(folder)), read()
    length = _length(inputs, tokenizer.longest, max_length)
    rows = tokenizer.encode(texts, length)
    longest = max(rows, key=lambda row: len(row.ids))
    most = takes and longest_taken(longest, inputs, tokenizer.padding, takes)
    if not most:  # it takes all; or none, and then its own error says more
        return rows, tokenizer.padding, None
    fixed = fixed_width(inputs)
    if fixed is not None:
        raise DataError(
            f"the length is fixed at {fixed} tokens, but the model takes {most} at most"
        )
    if max_length is not None:
        raise DataError(f"length {max_length}: the model takes {most} tokens at most")
    note = f"text is cut after {most} tokens: the model takes no more"
    return tokenizer.encode(texts, most), tokenizer.padding, note


def _length(inputs: Sequence[InputSpec], own: int | None, asked: int | None) -> int:
    """The most tokens of a text: as asked for, else as the tokenizer says and the model fixes, and
    128 where it fixes nothing. Raises DataError where more are asked for than the model fixes."""
    fixed = fixed_width(inputs)
    if asked is None:
        return min(fixed or DEFAULT_LENGTH, own or fixed or DEFAULT_LENGTH)
    if fixed is not None and asked > fixed:
        raise DataError(f"length {asked} was asked for, but the model's is fixed at {fixed}")
    return asked


def _of_tokens(
    rows: Sequence[Tokens],
    padding: Padding,
    inputs: Sequence[InputSpec],
    batch_size: int | None,
    what: str,
    note: str | None = None,
) -> Feeds:
    batch_of(inputs, batch_size)
    return Feeds(
        lambda: token_feeds(rows, inputs, padding, batch_size),
        inputs,
        what,
        note=note,
        is_text=True,
    )


def check_text(
    data: Data,
    *,
    tokenizer: str | Path | None,
    samples: int | None = None,
    max_length: int | None = None,
    text_columns: Sequence[str] = (),
    positions: int | None = None,
    seed: int = 0,
    progress: Reading | None = None,
) -> None:
    """Check the data as far as that needs no model: before it is exported, which takes minutes.

    The rows are those that ``open_data`` will read, unless it draws from a file. ``positions``:
    rows of the model's position table, None where it is not known. Raises DataError as
    ``open_data`` does.
    """
    _check_numbers(samples, None, max_length)
    columns = _columns(text_columns)
    if not isinstance(data, str | Path):
        return
    most = samples or DEFAULT_SAMPLES
    texts: Sequence[Sentence] | None
    stream = open_stream(data, progress)
    if stream is None:
        texts = _texts_of_file(data, most, columns)
    elif columns or not stream.columns() or _has_text(stream.columns()):
        texts = sampled_texts(stream, most, seed, columns).texts
    else:
        texts = None  # the columns may be the model's inputs
    if texts is None or tokenizer is None:
        return
    made = TextTokenizer(Path(tokenizer))
    rows = made.encode([*texts], max_length or DEFAULT_LENGTH)
    limit = None if positions is None else positions - made.padding.before_first - 1
    if max_length and limit is not None and max(len(row.ids) for row in rows) > limit:
        raise DataError(f"length {max_length}: the model takes {limit} tokens at most")


def _has_text(names: Sequence[str]) -> bool:
    return any(usual <= {*names} for usual in TEXT_COLUMNS)


def _texts_of_file(
    data: str | Path, most: int, columns: Sequence[str]
) -> Sequence[Sentence] | None:
    """The first texts of a file; None for data that is no text. Raises DataError."""
    path = Path(data)
    if path.suffix.lower() in FORMATS and path.is_file():
        return read_sentences(path, most, columns=columns)
    _refuse_columns(columns, f"data {str(data)!r} is no text")
    if not path.exists() and not user_function.is_function_name(str(data)):
        raise DataError(f"data {str(data)!r} does not exist, expected {_EXPECTED}")
    return None


def general_text(
    feeds: Feeds,
    tokenizer: str | Path | None,
    batch_size: int | None = None,
    max_length: int | None = None,
    takes: Takes | None = None,
) -> Feeds | None:
    """The sentences that ship with qcompile, as tokens of the model that ``feeds`` are for.

    None unless these are text: only then is the tokenizer known. Raises DataError as
    ``open_data`` does.
    """
    if not feeds.is_text or tokenizer is None:
        return None
    return open_data(
        SENTENCES,
        feeds.inputs,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        takes=takes,
    )


def sample_feeds(inputs: Sequence[InputSpec], batch_size: int | None = None) -> Feeds:
    """The 256 sentences that ship with qcompile, as tokens of BERT's uncased English vocabulary.

    Only for models of that vocabulary (30522 ids). Raises DataError where the model wants inputs
    that text does not give.
    """
    check_inputs(inputs)
    width = fixed_width(inputs) or DEFAULT_LENGTH
    with np.load(SAMPLES, allow_pickle=False) as stored:
        ends = np.cumsum(stored["lengths"], dtype=np.int64)[:-1]
        rows = [_shortened(ids.tolist(), width) for ids in np.split(stored["ids"], ends)]
    return _of_tokens(rows, Padding(), inputs, batch_size, "sample sentences")


def _shortened(ids: list[int], width: int) -> Tokens:
    """Truncate to the width, but keep the closing special token."""
    kept = ids if len(ids) <= width else [*ids[: width - 1], ids[-1]]
    return Tokens(kept, [0] * len(kept))
