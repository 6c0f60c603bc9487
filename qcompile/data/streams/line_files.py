"""Rows of .txt, .jsonl and .csv files of a stream, which may be compressed."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, TextIO

from qcompile.data.streams.blocks import Block, Choose
from qcompile.data.streams.extra_modules import import_extra
from qcompile.data.streams.storage import readable
from qcompile.data.streams.stream_files import StreamFile
from qcompile.data.text import PlacedRow, RawRow, placed_row, raw_rows

_ROWS = 512  # of a block


def line_blocks(file: StreamFile, choose: Choose) -> Iterator[Block]:
    """The rows of a file. ``choose`` sees the fields of the first one, so that a missing one is
    found at once.

    Raises DataError for what cannot be read, and for a line that is too long.
    """
    with readable(file.name), file.stored.open_binary() as raw, _text(file, raw) as text:
        rows = raw_rows(file.format, file.name, text)
        placed = partial(placed_row, file.format, file.name)
        is_first = True
        while chunk := list(islice(rows, _ROWS)):
            if is_first:
                first = placed(*chunk[0])
                choose(list(first.read()), first.where)
            is_first = False
            yield Block(len(chunk), partial(_chosen, chunk, placed), raw.tell())


def _chosen(
    chunk: Sequence[tuple[int, RawRow]],
    placed: Callable[[int, RawRow], PlacedRow],
    offsets: Sequence[int],
) -> Iterator[PlacedRow]:
    return (placed(*chunk[offset]) for offset in offsets)


@contextmanager
def _text(file: StreamFile, raw: BinaryIO) -> Iterator[TextIO]:
    with ExitStack() as opened:
        plain: Any = raw
        if file.compression == ".gz":
            plain = opened.enter_context(gzip.GzipFile(fileobj=raw))
        elif file.compression == ".zst":
            # pyarrow reads all frames of a file, and notices if the last one is truncated.
            pyarrow = import_extra(file.name, "pyarrow")
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            plain = opened.enter_context(stream)
        yield io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")
