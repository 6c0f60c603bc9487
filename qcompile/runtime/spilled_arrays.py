"""Arrays that are kept in files to save memory.

Each access maps the file again, so the pages are released with the view. The file is removed with
the object that represents the array.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import onnx

from qcompile.errors import OutputError
from qcompile.ir.lazy_values import FileValues
from qcompile.ir.model_io.node_proto import element_type
from qcompile.quant import Array, ChannelStats
from qcompile.system.temporary_folder import TemporaryFolder


def _remove(path: Path) -> None:
    """Windows removes no file that is mapped: it stays until the folder is removed."""
    with suppress(OSError):
        path.unlink()


class SpilledArray:
    """One array in its own file. Raises OutputError where there is no room."""

    def __init__(self, folder: TemporaryFolder, path: Path, values: Array) -> None:
        self._folder = folder  # lives as long as its files
        self.path, self.dtype, self.shape = path, values.dtype, values.shape
        self._gone = weakref.finalize(self, _remove, path)
        try:
            with path.open("wb") as file:
                file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        except OSError as e:
            where = str(folder.path.parent)
            raise OutputError(f"temporary folder {where!r} (TMPDIR): {e.strerror}") from e

    def load(self) -> Array:
        """A view into the file, read only."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", shape=self.shape)


class KeptValues(FileValues):
    """The values of a constant, kept in a file."""

    def __init__(self, kept: SpilledArray) -> None:
        kind = element_type(kept.dtype)
        super(FileValues, self).__init__(onnx.TensorProto(data_type=kind, dims=kept.shape))
        self._kept = kept

    def load(self) -> Array:
        """A view into the file."""
        return self._kept.load()


class Store:
    """A temporary folder for arrays. Raises OutputError where there is no room."""

    def __init__(self) -> None:
        self._folder, self._numbers = TemporaryFolder(), count()

    def keep(self, values: Array) -> SpilledArray:
        """Write an array."""
        path = self._folder.path / str(next(self._numbers))
        return SpilledArray(self._folder, path, values)

    def constant(self, values: Array) -> KeptValues:
        """Write the values of a constant."""
        return KeptValues(self.keep(values))

    def array(self, values: Array) -> Array:
        """A read-only view of an array in a file, which is removed with the view."""
        kept = self.keep(values)
        view = kept.load()
        _remove(kept.path)  # the mapping keeps the contents
        return view


class KeptChannels(MutableMapping[str, ChannelStats]):
    """Channel statistics by tensor, with samples of rows and second moments kept in files."""

    def __init__(self, store: Store, found: Mapping[str, ChannelStats]) -> None:
        self._store = store
        self._found: dict[str, tuple[ChannelStats, SpilledArray, SpilledArray | None]] = {}
        self.update(found)

    def __getitem__(self, name: str) -> ChannelStats:
        stats, rows, moments = self._found[name]
        return replace(stats, rows=rows.load(), moments=None if moments is None else moments.load())

    def __setitem__(self, name: str, stats: ChannelStats) -> None:
        rest = replace(stats, rows=stats.rows[:0].copy(), moments=None)
        moments = None if stats.moments is None else self._store.keep(stats.moments)
        self._found[name] = rest, self._store.keep(stats.rows), moments

    def __delitem__(self, name: str) -> None:
        del self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
