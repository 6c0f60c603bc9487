"""Rows of .txt, .jsonl and .csv files of a stream, which may be compressed."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import BinaryIO, TextIO

from qcompile.data.streams.blocks import Block, Choose
from qcompile.data.streams.pyarrow_modules import import_pyarrow
from qcompile.data.streams.storage import readable
from qcompile.data.streams.stream_files import StreamFile
from qcompile.data.text import rows_of

_ROWS = 512  # of a block


def line_blocks(file: StreamFile, choose: Choose) -> Iterator[Block]:
    """The rows of a file. ``choose`` sees the fields of the first one, so that a missing one is
    found at once.

    Raises DataError for what cannot be read, and for a line that is too long.
    """
    with readable(file.name), file.stored.open() as raw, _text(file, raw) as text:
        rows = rows_of(file.format, file.name, text)
        is_first = True
        while chunk := list(islice(rows, _ROWS)):
            if is_first:
                choose(list(chunk[0].read()), chunk[0].where)
            is_first = False
            yield Block(len(chunk), lambda offsets, c=chunk: (c[i] for i in offsets), raw.tell())


@contextmanager
def _text(file: StreamFile, raw: BinaryIO) -> Iterator[TextIO]:
    with ExitStack() as opened:
        plain = raw
        if file.compression == ".gz":
            plain = opened.enter_context(gzip.GzipFile(fileobj=raw))
        elif file.compression == ".zst":
            # pyarrow reads all frames of a file, and notices if the last one is truncated.
            pyarrow = import_pyarrow(file.name)
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            plain = opened.enter_context(stream)
        yield io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")
