"""SHA-256 of what goes into a build: files of a model, feeds as they stream by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qcompile.data.feeds import Feed
from qcompile.errors import DataError, ModelError

_CHUNK = 1 << 20


def of_file(path: Path) -> str:
    """Hex digest of a file, read in pieces. Raises DataError where it cannot be read."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                found.update(piece)
    except OSError as e:
        raise DataError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    return found.hexdigest()


def of_model(model: bytes | Path, external: Sequence[Path] = ()) -> str:
    """Hex digest of a model: of its bytes, or of its file and then of what lies outside it.

    Raises ModelError where a file cannot be read.
    """
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    try:
        own = of_file(model)
        rest = [of_file(path) for path in external]
    except DataError as e:
        raise ModelError(f"model {e}") from e
    return hashlib.sha256("".join([own, *rest]).encode()).hexdigest() if rest else own


def of_feeds(feeds: Iterable[Feed]) -> str:
    """Hex digest of feeds that nothing else needs."""
    made = FeedDigest()
    for feed in feeds:
        made.update(feed)
    return made.hexdigest()


class FeedDigest:
    """Digest of all feeds that have passed, in their order: names, types, shapes and values."""

    def __init__(self) -> None:
        self._found = hashlib.sha256()

    def passing(self, feeds: Iterable[Feed]) -> Iterator[Feed]:
        """The same feeds."""
        for feed in feeds:
            self.update(feed)
            yield feed

    def update(self, feed: Feed) -> None:
        """Take in one feed."""
        for name, array in sorted(feed.items()):
            self._found.update(f"{name} {array.dtype.str} {array.shape}".encode())
            self._found.update(np.ascontiguousarray(array).tobytes())

    def hexdigest(self) -> str:
        return self._found.hexdigest()
