"""Rows from Python objects: texts, pairs of texts, and tables with named columns.

| object | known by | a row is |
|---|---|---|
| a list, array or generator of texts | its first item | a string, or a pair of strings |
| a list or generator of dicts | a string in its first item | a dict, as a line of .jsonl |
| a Dataset of ``datasets`` | ``column_names`` | a dict |
| a Table or Dataset of pyarrow | ``schema`` and ``to_batches`` | a dict |
| a DataFrame of pandas or polars | ``columns`` | a dict, made from its columns |

Rows count from 0. None of these libraries is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np

from qcompile.data.feeds import Feed, InputSpec
from qcompile.data.npz import batch_of
from qcompile.data.text import TEXT_COLUMNS, sentence_of
from qcompile.data.tokenizer import Sentence
from qcompile.errors import DataError
from qcompile.quant import Array

Row: TypeAlias = Mapping[str, Any]
_ROWS = 1024


@dataclass(frozen=True)
class Table:
    """The names of a table's columns, and its rows, which can be read again. name: of the table, in
    errors."""

    names: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    name: str = "data"

    def placed_rows(self) -> Iterator[tuple[str, Row]]:
        """The rows, each with its place as errors name it."""
        return ((f"{self.name}, row {index}", row) for index, row in enumerate(self.rows()))

    def has(self, inputs: Sequence[InputSpec]) -> bool:
        """Whether there is a column for each input."""
        return all(spec.name in self.names for spec in inputs)

    def check_text(self, inputs: Sequence[InputSpec], columns: Sequence[str]) -> None:
        """Raises DataError where the table lacks the text columns."""
        found = ", ".join(self.names) or "none"
        for name in columns:
            if name not in self.names:
                raise DataError(f"{self.name} has no column {name!r}, expected one of {found}")
        if not columns and not any(names <= {*self.names} for names in TEXT_COLUMNS):
            needed = ", ".join(spec.name for spec in inputs)
            raise DataError(
                f"{self.name} has the columns {found}, expected a column for each input of the "
                f"model ({needed}), or text: name its columns by text_columns (--text-columns)"
            )


def table_of(data: object) -> Table | None:
    """The table that the object is; None if it is none."""
    names = getattr(getattr(data, "schema", None), "names", None)
    if isinstance(names, list) and hasattr(data, "to_batches"):
        return Table(tuple(map(str, names)), lambda: _batch_rows(data))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        return None
    names = getattr(data, "column_names", ())
    if names is None:  # a streamed Dataset, which knows them from its first row
        names = [*next((_checked_row(row) for row in data), {})]
    if isinstance(names, list | tuple) and hasattr(data, "column_names"):
        return Table(tuple(map(str, names)), lambda: map(_checked_row, data))
    columns = getattr(data, "columns", None)
    if isinstance(columns, Iterable) and hasattr(data, "__getitem__"):
        frame: Any = data
        return Table(tuple(map(str, columns)), lambda: _frame_rows(frame))
    return None


def _checked_row(row: object) -> Row:
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise DataError(f"data yields {kind}, expected rows as dicts of column name to value")
    return row


def _batch_rows(data: Any) -> Iterator[Row]:
    for batch in data.to_batches():
        for start in range(0, batch.num_rows, _ROWS):  # few rows are Python objects at a time
            yield from batch.slice(start, _ROWS).to_pylist()


def _frame_rows(frame: Any) -> Iterator[Row]:
    columns = list(frame.columns)
    names = tuple(map(str, columns))
    for cells in zip(*(frame[column] for column in columns), strict=True):
        yield dict(zip(names, cells, strict=True))


def peek(data: Iterable[object]) -> tuple[object, Iterable[object]]:
    """The first item, None where there is none, and the data, still with that item.

    Only lists and the like, and iterators, are looked into: to begin another loop over something
    else may have effects, as of torch's DataLoader. Raises DataError where the source fails.
    """
    is_one_pass = isinstance(data, Iterator)
    if not is_one_pass and not hasattr(data, "__getitem__"):
        return None, data
    items = iter(data)
    try:
        first = list(islice(items, 1))
    except DataError:
        raise
    except (Exception, SystemExit) as e:
        message = f"{type(e).__name__}: {e}".splitlines()[0]
        raise DataError(f"data failed after 0 feeds: {message}") from e
    return (first[0] if first else None), chain(first, items) if is_one_pass else data


def is_text(item: object, inputs: Sequence[InputSpec]) -> bool:
    """Whether an item is a text, a pair of texts, or a row with a text, and no feed."""
    if isinstance(item, Mapping):
        is_feed = all(spec.name in item for spec in inputs)
        return not is_feed and any(isinstance(value, str) for value in item.values())
    return isinstance(item, str) or _texts(item) is not None


def _texts(item: object) -> Sentence | None:
    """The strings of a list, tuple or array of nothing else; None for other items."""
    if not isinstance(item, list | tuple | np.ndarray) or len(np.shape(item)) != 1:
        return None
    texts = tuple(str(text) for text in item if isinstance(text, str))
    return texts if texts and len(texts) == len(item) else None


def sentences(items: Iterable[object], columns: Sequence[str]) -> Iterator[Sentence]:
    """The text or the pair of each item. Raises DataError, with the row."""
    for index, item in enumerate(items):
        where = f"data, row {index}"
        texts = None if isinstance(item, Mapping | str) else _texts(item)
        if isinstance(item, Mapping):
            yield sentence_of(item, where, columns)
        elif columns:
            kind = type(item).__name__
            raise DataError(f"{where}: found {kind}, which has no column {columns[0]!r}")
        elif isinstance(item, str):
            yield (str(item),)
        elif texts is not None and len(texts) <= 2:
            yield texts
        else:
            raise DataError(f"{where}: found {_kind(item)}, expected a text or a pair of texts")


def _kind(item: object) -> str:
    kind = type(item).__name__
    return f"{kind} of {len(item)}" if isinstance(item, list | tuple) else kind


def array_feeds(
    rows: Iterable[tuple[str, Row]], inputs: Sequence[InputSpec], batch_size: int | None
) -> Iterator[Feed]:
    """Batches of rows, each with its place for errors: an input is stacked from its column,
    [batch, …]; a column of numbers for an input of rank 2 is [batch, 1]. To fill a model's fixed
    batch size, rows are repeated.

    Raises DataError, with row and column.
    """
    batch, is_fixed = batch_of(inputs, batch_size)
    left = iter(rows)
    while chunk := list(islice(left, batch)):
        if is_fixed:
            chunk = [chunk[i % len(chunk)] for i in range(batch)]
        yield {spec.name: _stacked(chunk, spec) for spec in inputs}


def _stacked(rows: Sequence[tuple[str, Row]], spec: InputSpec) -> Array:
    cells: list[Array] = []
    for place, row in rows:
        where = f"{place}, column {spec.name!r}"
        cell = _cell(row.get(spec.name), spec, where)
        if cells and cell.shape != cells[0].shape:
            raise DataError(
                f"{where}: found shape {list(cell.shape)}, but {list(cells[0].shape)} before in "
                "this batch: pad the rows to one length, or read them one by one (batch size 1)"
            )
        cells.append(cell)
    stacked = np.stack(cells)
    is_column = stacked.ndim == 1 and spec.shape is not None and len(spec.shape) == 2
    return stacked[:, None] if is_column else stacked


def _cell(value: object, spec: InputSpec, where: str) -> Array:
    """A value in the input's type, if nothing but digits of floats is lost."""
    try:
        found = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise DataError(f"{where}: {type(value).__name__} is no array: {e}") from e
    if spec.dtype.kind == "O":
        return found.astype(object)
    if not np.can_cast(found.dtype, spec.dtype, "same_kind"):
        shown = type(value).__name__ if found.dtype.kind == "O" else found.dtype
        raise DataError(f"{where}: found {shown}, expected {spec.dtype}")
    cast: Array = found.astype(spec.dtype)
    if found.dtype.kind in "iu" and spec.dtype.kind in "iu" and not np.array_equal(found, cast):
        raise DataError(f"{where}: found integers that {spec.dtype} cannot hold")
    return cast
