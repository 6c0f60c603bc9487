"""Atomic writes: a file appears completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qcompile.errors import OutputError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically. Raises OutputError as ``replacing`` does."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a temporary file that replaces ``path`` at the end of the block.

    An existing file survives failures.

    Raises OutputError where the folder is missing, read only or full.
    """
    path = destination(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as e:
        raise OutputError(f"cannot write {str(path)!r}: {e.strerror}") from e
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        Path(name).chmod(0o666 & ~umask())
        Path(name).replace(path)
    except OSError as e:
        raise OutputError(f"cannot write {str(path)!r}: {e.strerror}") from e
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()


def umask() -> int:
    """The process's umask: permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: Path) -> None:
    """Raise OutputError, before any work is done, where the output cannot be written."""
    path = destination(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as e:
        raise OutputError(f"output folder {str(path.parent)!r}: {e.strerror}") from e


def destination(path: Path) -> Path:
    """The path with links resolved. Raises OutputError for what cannot be a regular file."""
    try:
        resolved = path.resolve()
        if resolved.is_dir():
            raise OutputError(f"output {str(path)!r} is a folder, expected a file name")
        if resolved.exists() and not resolved.is_file():
            raise OutputError(f"output {str(path)!r} is a device or pipe, expected a file")
        if not resolved.parent.is_dir():
            raise OutputError(f"output folder {str(path.parent)!r} does not exist")
    except (OSError, RuntimeError) as e:  # a name too long, a loop of links
        raise OutputError(f"output {str(path)!r} is not a usable file name: {e}") from e
    return resolved
