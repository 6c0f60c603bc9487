"""Files whose contents are viewed, not read: weights stay on disk until somebody looks at them.

Pages that were looked at count as this process's memory until they are dropped, so that is done
whenever a few dozen megabytes have been handed out. Views stay valid: their pages come back from
the file.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

_KEPT = 1 << 26  # bytes handed out before pages are dropped


class MappedFile:
    """A file in the address space, read only. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(0, 2)
            self.size = file.tell()
            # The mapping of an empty file would be an error.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        self._seen = 0

    @property
    def data(self) -> mmap.mmap | bytes:
        """All of it, without a copy."""
        return self._map

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes of the file, read only; they must lie inside it."""
        self._seen += size
        if self._seen > _KEPT:
            self.drop()
        return np.frombuffer(self._map, np.uint8, size, offset)

    def drop(self) -> None:
        """Give back the memory of all pages that were looked at."""
        self._seen = 0
        if isinstance(self._map, mmap.mmap):
            self._map.madvise(mmap.MADV_DONTNEED)
