"""Rows of Parquet and Arrow files: a batch of the chosen columns is in memory at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

from qcompile.data.streams.blocks import Block, Choose
from qcompile.data.streams.extra_modules import import_extra
from qcompile.data.streams.storage import readable
from qcompile.data.streams.stream_files import StreamFile
from qcompile.data.text import PlacedRow

_ROWS = 1024  # decoded at a time
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_FILE_MAGIC = b"ARROW1"  # of Arrow's file format; its stream format has none


def column_names(file: StreamFile) -> tuple[str, ...]:
    """The columns. Raises DataError for what is no such file."""
    with readable(file.name), file.stored.open_binary() as raw:
        if file.format == ".parquet":
            with _parquet(file, raw) as opened:
                return tuple(opened.schema_arrow.names)
        return tuple(_arrow_reader(file, raw).schema.names)


def columnar_blocks(file: StreamFile, choose: Choose) -> Iterator[Block]:
    """The rows of a file, numbered from 0, with the columns that ``choose`` wants.

    Blocks are row groups of Parquet, which are read only where rows of them are asked for, and
    batches of Arrow. Raises DataError for what cannot be read.
    """
    with readable(file.name), file.stored.open_binary() as raw:
        if file.format == ".parquet":
            with _parquet(file, raw) as opened:
                yield from _row_groups(file, opened, choose)
        else:
            yield from _batches(file, raw, choose)


@contextmanager
def _parquet(file: StreamFile, raw: BinaryIO) -> Iterator[Any]:
    parquet = import_extra(file.name, "pyarrow.parquet")
    with parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False) as opened:
        yield opened


def _row_groups(file: StreamFile, opened: Any, choose: Choose) -> Iterator[Block]:
    columns, first, total = choose(opened.schema_arrow.names, file.name), 0, opened.metadata
    for group in range(total.num_row_groups):
        count = total.row_group(group).num_rows
        batches = partial(
            opened.iter_batches, _ROWS, row_groups=[group], columns=columns, use_threads=False
        )
        done = (file.stored.size or 0) * (first + count) // max(1, total.num_rows)
        yield Block(count, partial(_rows, file.name, first, batches), done)
        first += count


def _batches(file: StreamFile, raw: BinaryIO, choose: Choose) -> Iterator[Block]:
    reader = _arrow_reader(file, raw)
    columns, first = choose(reader.schema.names, file.name), 0
    for batch in _arrow_batches(reader):
        batch.validate(full=True)  # offsets of a damaged file may point outside of it
        parts = partial(_parts, batch.select(columns))
        yield Block(batch.num_rows, partial(_rows, file.name, first, parts), raw.tell())
        first += batch.num_rows


def _arrow_reader(file: StreamFile, raw: BinaryIO) -> Any:
    ipc = import_extra(file.name, "pyarrow.ipc")
    is_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    raw.seek(0)
    return ipc.open_file(raw) if is_file else ipc.open_stream(raw)


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if not hasattr(reader, "num_record_batches"):
        return iter(reader)
    return map(reader.get_batch, range(reader.num_record_batches))


def _parts(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))


def _rows(name: str, first: int, batches: Any, offsets: Sequence[int]) -> Iterator[PlacedRow]:
    """The rows at these offsets; ``first`` is the number of the first row of all batches."""
    with readable(name):
        start = position = 0
        for batch in batches():
            if position == len(offsets):
                return
            end = bisect_left(offsets, start + batch.num_rows, position)
            own = [offset - start for offset in offsets[position:end]]
            for offset, row in zip(own, _taken(batch, own), strict=True):
                yield PlacedRow(f"{name}, row {first + start + offset}", partial(dict, row))
            start, position = start + batch.num_rows, end


def _taken(batch: Any, offsets: Sequence[int]) -> Iterator[Any]:
    """Rows as dicts. Single rows are sliced, since ``take`` does not know every type."""
    if len(offsets) == batch.num_rows:
        return iter(batch.to_pylist())
    return (batch.slice(offset, 1).to_pylist()[0] for offset in offsets)
