"""A digest of calibration data, feed by feed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from qcompile.data.feeds import Feed


def digest_feeds(feeds: Iterable[Feed]) -> str:
    """Hex digest of all feeds."""
    digest = FeedDigest()
    for feed in feeds:
        digest.update(feed)
    return digest.hexdigest()


class FeedDigest:
    """Digest of all feeds that have passed, in their order: names, types, shapes and values."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def passing(self, feeds: Iterable[Feed]) -> Iterator[Feed]:
        """The same feeds, each added to the digest."""
        for feed in feeds:
            self.update(feed)
            yield feed

    def update(self, feed: Feed) -> None:
        """Add one feed to the digest."""
        for name, array in sorted(feed.items()):
            self._hash.update(f"{name} {array.dtype.str} {array.shape}".encode())
            self._hash.update(np.ascontiguousarray(array).tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
