"""Feeds from .npz files, read as a stream: one batch is in memory, whatever the file's size.

``x.npz`` has its samples on axis 0 of every array; a folder of .npz has one feed in each file.
Arrays that the model does not declare are not read, and pickled ones never are.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from qcompile.data.feeds import Feed, InputSpec
from qcompile.errors import DataError
from qcompile.quant import Array

DEFAULT_BATCH = 8
_MOST = 1 << 30  # bytes of one array of one feed: a few bytes of deflated zeros expand to as many


def batch_of(inputs: Sequence[InputSpec], asked: int | None) -> tuple[int, bool]:
    """Batch size, and whether the model fixes it (axis 0 of its first input with a fixed one).

    Raises DataError where another size was asked for.
    """
    for spec in inputs:
        fixed = spec.dim(0)
        if not isinstance(fixed, int):
            continue
        if asked not in (None, fixed):
            raise DataError(
                f"batch size {asked} was asked for, expected {fixed}: "
                f"the model fixes axis 0 of input {spec.name!r}"
            )
        return fixed, True
    return asked or DEFAULT_BATCH, False


@dataclass
class _Member:
    """One array of an .npz, read from the front in slices of axis 0.

    ``held``: its bytes according to the archive, which may be wrong; no more are read.
    """

    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    held: int
    whole: Array | None = None
    position: int = 0

    def take(self, rows: int) -> Array:
        """The next rows as a new array; fewer at the end of the array."""
        start, self.position = self.position, min(self.position + rows, self.shape[0])
        if self.whole is not None:
            return self.whole[start : self.position]
        return self.read((self.position - start, *self.shape[1:]))

    def rest(self) -> Array:
        """The whole array; only before any ``take``."""
        return self.read(self.shape) if self.whole is None else self.whole

    def read(self, shape: tuple[int, ...]) -> Array:
        """Read an array of that shape. Raises EOFError where the file ends early, ValueError where
        it is over 1 GiB.
        """
        size = math.prod(shape) * self.dtype.itemsize
        if size > min(_MOST, self.held):
            if size > _MOST:
                raise ValueError(f"one feed of it takes {size} bytes, over {_MOST}")
            raise EOFError("it is truncated")
        values: Array = np.empty(shape, self.dtype)
        raw = self.stream.read(values.nbytes)
        if len(raw) < values.nbytes:
            raise EOFError("it is truncated")
        values.reshape(-1)[:] = np.frombuffer(raw, self.dtype)
        return values


def _open_member(stream: IO[bytes], held: int) -> _Member:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"its .npy version {version} is not known")
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    member = _Member(stream, shape, dtype, held)
    if is_fortran and len(shape) > 1:  # rows are not contiguous, so it is read at once
        member.whole = member.read(shape[::-1]).T
    return member


@contextmanager
def _members(path: Path, inputs: Sequence[InputSpec]) -> Iterator[dict[str, _Member]]:
    """The declared arrays of an .npz, opened. Raises DataError where one is missing or damaged."""
    at = "the file"
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(path))
            held = {n.removesuffix(".npy"): n for n in archive.namelist()}
            found: dict[str, _Member] = {}
            for spec in inputs:
                if spec.name not in held:
                    raise DataError(_missing_message(path, spec.name, held, inputs))
                at = f"array {spec.name!r}"
                stream = stack.enter_context(archive.open(held[spec.name]))
                size = archive.getinfo(held[spec.name]).file_size
                found[spec.name] = _open_member(stream, size)
            at = "an array"
            yield found
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        message = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise DataError(f"{path}: {at} cannot be read: {message}") from e


def _missing_message(
    path: Path, name: str, held: Mapping[str, str], inputs: Sequence[InputSpec]
) -> str:
    return (
        f"{path}: no array for input {name!r}; found {', '.join(held) or 'nothing'}, "
        f"expected {', '.join(spec.name for spec in inputs)}"
    )


def _unsliced(members: Mapping[str, _Member], inputs: Sequence[InputSpec]) -> set[str]:
    """Arrays that are fed whole to each batch: scalars, and those of a fixed shape where the others
    have another number of samples."""
    scalars = {n for n, m in members.items() if not m.shape}
    if len({m.shape[0] for m in members.values() if m.shape}) < 2:
        return scalars
    fixed = {s.name for s in inputs if s.shape == members[s.name].shape}
    return scalars | fixed


def _length(path: Path, sliced: Mapping[str, _Member]) -> int:
    """Number of samples. Raises DataError where arrays disagree, or have none."""
    lengths = {name: m.shape[0] for name, m in sliced.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise DataError(
            f"{path}: found {counts} samples, expected as many on axis 0 of every array"
        )
    if 0 in lengths.values():
        raise DataError(f"{path}: holds no samples, expected some on axis 0 of its arrays")
    return next(iter(lengths.values()), 1)


def read_batches(
    path: Path, inputs: Sequence[InputSpec], batch_size: int | None, samples: int | None
) -> Iterator[Feed]:
    """Batches of slices along axis 0; to fill a model's fixed batch size, rows are repeated."""
    with _members(path, inputs) as members:
        whole = _unsliced(members, inputs)
        sliced = {name: m for name, m in members.items() if name not in whole}
        batch, is_fixed = batch_of([s for s in inputs if s.name in sliced], batch_size)
        left = min(_length(path, sliced), samples or 2**62)
        constant = {name: members[name].rest() for name in sorted(whole)}
        while left > 0:
            rows = min(batch, left)
            feed = {**constant, **{name: m.take(rows) for name, m in sliced.items()}}
            if is_fixed and rows < batch:
                feed.update({n: feed[n][np.arange(batch) % rows] for n in sliced})
            yield feed
            left -= rows


def read_folder(files: Sequence[Path], inputs: Sequence[InputSpec]) -> Iterator[Feed]:
    """One feed from each file."""
    for path in files:
        with _members(path, inputs) as members:
            feed = {name: m.rest() for name, m in members.items()}
        yield feed


def check_npz(path: Path, inputs: Sequence[InputSpec], batch_size: int | None) -> None:
    """Opens an .npz of samples and reads its headers, to fail before any work is done."""
    with _members(path, inputs) as members:
        whole = _unsliced(members, inputs)
        _length(path, {n: m for n, m in members.items() if n not in whole})
        batch_of([s for s in inputs if s.name not in whole], batch_size)


def list_folder(folder: Path) -> list[Path]:
    """The .npz files of a folder by name. Raises DataError where there are none."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".npz" and p.is_file())
    if not files:
        raise DataError(
            f"folder {str(folder)!r} holds no .npz files, expected one for each feed; or name "
            f"files of text or tables, as in '{folder}/*.parquet'"
        )
    return files
