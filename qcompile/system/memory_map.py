"""Memory-mapped files: weights stay on disk until they are used.

Pages that were read count as memory of this process until they are dropped, so they are dropped
after every few dozen megabytes of views. Views stay valid: their pages are read again from the
file.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

_KEPT = 1 << 26  # bytes of views before pages are dropped


class MappedFile:
    """A memory-mapped file, read only. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(0, 2)
            self.size = file.tell()
            # An empty file cannot be mapped.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        self._seen = 0

    @property
    def data(self) -> mmap.mmap | bytes:
        """The whole file, without a copy."""
        return self._map

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes of the file, uint8 (size,), read only; the span must lie inside the file."""
        self._seen += size
        if self._seen > _KEPT:
            self.drop()
        return np.frombuffer(self._map, np.uint8, size, offset)

    def drop(self) -> None:
        """Release the memory of all pages that were read."""
        self._seen = 0
        if isinstance(self._map, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)
