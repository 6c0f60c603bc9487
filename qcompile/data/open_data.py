"""Opens calibration and verification data of any format as feeds checked for one model.

| format | read as |
|---|---|
| ``x.npz`` | arrays by input name, samples on axis 0, in batches |
| a folder of .npz | each file one feed, by name |
| ``.jsonl``, ``.csv``, ``.txt`` | sentences, with a folder that holds ``tokenizer.json`` |
| ``package.module:function`` | a callable that returns feeds |
| Python | an iterable of feeds, one feed, or a callable that returns either |
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
from qcompile.data.text import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    FORMATS,
    Takes,
    check_inputs,
    fixed_width,
    longest_taken,
    read_sentences,
    token_feeds,
)
from qcompile.data.tokenizer import Padding, Sentence, TextTokenizer, Tokens
from qcompile.errors import DataError
from qcompile.system import user_function

Data: TypeAlias = str | Path | Mapping[str, object] | Iterable[object] | Callable[[], object]

SENTENCES = Path(__file__).parent / "samples" / "calibration.txt"
SAMPLES = SENTENCES.with_suffix(".npz")
_EXPECTED = "x.npz, a folder of .npz, a .jsonl, .txt or .csv file, or package.module:function"


def open_data(
    data: Data,
    inputs: Sequence[InputSpec],
    *,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    takes: Takes | None = None,
    seed: int | None = None,
) -> Feeds:
    """Feeds that fit ``inputs``, in batches of ``batch_size`` (8; the model's, where it fixes one).

    ``samples`` ends the data after that many (text: 256, everything else: all). ``batch_size`` is
    for .npz files of samples and for text: other formats consist of feeds. ``max_length`` truncates
    text; by default the tokenizer's own limit does, and 128 tokens. ``takes`` runs the model on
    text, which is cut where it takes no more. ``seed`` draws the samples of text from the whole
    file, which may be sorted by label. Raises DataError for what can be seen without running
    through the data.
    """
    for name, value in (("samples", samples), ("batch size", batch_size), ("length", max_length)):
        if value is not None and value < 1:
            raise DataError(f"{name} {value}: expected at least 1")
    if not isinstance(data, str | Path):
        return _from_python(data, inputs, samples)
    path = Path(data)
    if not path.exists() and user_function.is_function_name(str(data)):
        return _from_function(str(data), inputs, samples)
    if not path.exists():
        raise DataError(f"data {str(data)!r} does not exist, expected {_EXPECTED}")
    if path.is_dir():
        files = list_folder(path)
        return Feeds(lambda: read_folder(files, inputs), inputs, str(path), samples=samples)
    if path.suffix.lower() in FORMATS:
        read = partial(read_sentences, path, samples or DEFAULT_SAMPLES, seed)
        rows, padding, note = _tokenized(path, read, inputs, tokenizer, max_length, takes)
        return _of_tokens(rows, padding, inputs, batch_size, str(path), note)
    if path.suffix.lower() != ".npz":
        raise DataError(f"data {str(data)!r} is of no known format, expected {_EXPECTED}")
    check_npz(path, inputs, batch_size)
    return Feeds(
        lambda: read_batches(path, inputs, batch_size, samples), inputs, str(path), samples=samples
    )


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
    path: Path,
    read: Callable[[], list[Sentence]],
    inputs: Sequence[InputSpec],
    folder: str | Path | None,
    max_length: int | None,
    takes: Takes | None,
) -> tuple[list[Tokens], Padding, str | None]:
    """The text as tokens, no longer than model and tokenizer allow; a note where it was cut because
    the model takes no more. Raises DataError."""
    if folder is None:
        raise DataError(f"{path} is text and needs a tokenizer: a folder holding tokenizer.json")
    check_inputs(inputs)
    tokenizer, sentences = TextTokenizer(Path(folder)), read()
    length = _length(inputs, tokenizer.longest, max_length)
    rows = tokenizer.encode(sentences, length)
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
    return tokenizer.encode(sentences, most), tokenizer.padding, note


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
    return Feeds(lambda: token_feeds(rows, inputs, padding, batch_size), inputs, what, note=note)


def general_text(
    data: Data,
    inputs: Sequence[InputSpec],
    tokenizer: str | Path | None,
    batch_size: int | None = None,
    max_length: int | None = None,
    takes: Takes | None = None,
) -> Feeds | None:
    """The sentences that ship with qcompile, as tokens of the model that ``data`` is for.

    None unless ``data`` is text: only then is the tokenizer known. Raises DataError as
    ``open_data`` does.
    """
    is_text = isinstance(data, str | Path) and Path(data).suffix.lower() in FORMATS
    if not is_text or tokenizer is None:
        return None
    return open_data(
        SENTENCES,
        inputs,
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
