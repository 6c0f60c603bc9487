"""Rows of a data file of any size, read from disk when they are asked for.

One pass checks every row and writes where it begins into a temporary file; so memory does not grow
with the data, and any order of rows can be read. Nothing is kept of the rows themselves.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from qcompile.data.text import FORMATS, LONGEST_LINE, json_row
from qcompile.errors import DataError
from qcompile.system.temporary_folder import TemporaryFolder

Row: TypeAlias = Mapping[str, Any]
# Checks a row, and gives the number of samples in it. Raises ValueError for one that is not usable,
# or DataError that says where it is, as the second argument does.
Check: TypeAlias = Callable[[Row, str], int]
_ENTRY = np.dtype([("offset", "<u8"), ("part", "<u4")])
_BUFFERED = 4096  # entries written at a time


class LabelledRows:
    """The samples of a UTF-8 .jsonl, .csv or .txt file, by number; a row may have several.

    A .txt line is a row with the field text; a .csv has its fields by header. ``digest`` is
    SHA-256 of the file's bytes.

    Raises DataError, with the line, for what cannot be read or used.
    """

    def __init__(self, path: Path, check: Check) -> None:
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"{path} is of no known format, expected {', '.join(FORMATS)}")
        self.path = path
        self._folder = TemporaryFolder()
        self._index = self._folder.path / "index"
        self._header: list[str] | None = None
        try:
            with path.open("rb") as file, self._index.open("wb") as index:
                self.digest, self._count = self._scan(file, index, check)
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror}") from e
        if not self._count:
            raise DataError(f"{path} holds no rows, expected at least one")

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Iterable[int]) -> list[tuple[Row, int]]:
        """The rows of these samples, and each sample's number within its row. Raises DataError."""
        try:
            with self.path.open("rb") as file, self._index.open("rb") as index:
                return [self._read(number, file, index) for number in numbers]
        except OSError as e:
            raise DataError(f"{self.path} cannot be read: {e.strerror}") from e

    def _read(self, number: int, file: IO[bytes], index: IO[bytes]) -> tuple[Row, int]:
        index.seek(number * _ENTRY.itemsize)
        offset, part = np.frombuffer(index.read(_ENTRY.itemsize), _ENTRY)[0].item()
        file.seek(offset)
        try:
            _, row = next(self._rows(_Lines(self.path, file, offset)))
        except (DataError, StopIteration) as e:
            raise self.changed(e) from e
        return row, part

    def changed(self, found: Exception) -> DataError:
        """The error for a row that could be used before."""
        reason = str(found) or "it is shorter"
        return DataError(f"{self.path} has changed since it was first read: {reason}")

    def _scan(self, file: IO[bytes], index: IO[bytes], check: Check) -> tuple[str, int]:
        """Check all rows, and write where each sample is. Gives digest and number of samples."""
        digest = sha256()
        lines = _Lines(self.path, file, on_bytes=digest.update)
        if self.path.suffix.lower() == ".csv":
            self._header = [name.strip() for name in next(csv.reader(lines), [])]
        entries: list[tuple[int, int]] = []
        count = 0
        for start, row in self._rows(lines):
            try:
                parts = check(row, str(lines))
            except ValueError as e:
                raise DataError(f"{lines}: {e}") from e
            entries += [(start, part) for part in range(parts)]
            count += parts
            if len(entries) >= _BUFFERED:
                index.write(np.array(entries, _ENTRY).tobytes())
                entries.clear()
        index.write(np.array(entries, _ENTRY).tobytes())
        return digest.hexdigest(), count

    def _rows(self, lines: _Lines) -> Iterator[tuple[int, Row]]:
        """Rows from here on, and where each begins."""
        if self._header is not None:
            return _csv_rows(lines, self._header)
        return _line_rows(lines, is_json=self.path.suffix.lower() == ".jsonl")


class _Lines:
    """The lines of a file from an offset; ``offset`` and ``number`` are those reached.

    Raises DataError for a line that is too long, before it is read into memory, or not UTF-8.
    """

    def __init__(
        self,
        path: Path,
        file: IO[bytes],
        offset: int = 0,
        on_bytes: Callable[[bytes], object] = len,
    ) -> None:
        self._path, self._file, self._on_bytes = path, file, on_bytes
        self.offset, self.number = offset, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        is_first = self.offset == 0
        self.offset += len(line)
        self.number += 1
        self._on_bytes(line)
        if len(line) > LONGEST_LINE:
            raise DataError(f"{self}: over {LONGEST_LINE} bytes")
        try:
            return line.decode("utf-8-sig" if is_first else "utf-8")
        except UnicodeDecodeError as e:
            raise DataError(f"{self}: not UTF-8 text: {e.reason}") from e

    def __str__(self) -> str:
        return f"{self._path}, line {self.number}"


def _line_rows(lines: _Lines, *, is_json: bool) -> Iterator[tuple[int, Row]]:
    start = lines.offset
    for line in lines:
        if line.strip():
            yield start, json_row(line, lines) if is_json else {"text": line.strip()}
        start = lines.offset


def _csv_rows(lines: _Lines, header: list[str]) -> Iterator[tuple[int, Row]]:
    """A quoted field may have line ends, so csv decides where a row ends."""
    reader = csv.DictReader(lines, header, strict=True)
    while True:
        start = lines.offset
        try:
            row = next(reader, None)
        except csv.Error as e:
            raise DataError(f"{lines}: not CSV: {e}") from e
        if row is None:
            return
        if None in row:
            raise DataError(
                f"{lines}: more fields than the header's {len(header)}; quote text with commas"
            )
        yield start, row
