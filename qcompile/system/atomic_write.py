"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qcompile.errors import OutputError


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes as ``replacing`` does."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes are the file once all are written; an existing file survives failures.

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
    """The permissions that new files must not have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: Path) -> None:
    """Fail before any work is done where the output cannot be written. Raises OutputError."""
    path = destination(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as e:
        raise OutputError(f"output folder {str(path.parent)!r}: {e.strerror}") from e


def destination(path: Path) -> Path:
    """The file behind a name, links followed. Raises OutputError for what is no regular file."""
    try:
        found = path.resolve()
        if found.is_dir():
            raise OutputError(f"output {str(path)!r} is a folder, expected a file name")
        if found.exists() and not found.is_file():
            raise OutputError(f"output {str(path)!r} is a device or pipe, expected a file")
        if not found.parent.is_dir():
            raise OutputError(f"output folder {str(path.parent)!r} does not exist")
    except (OSError, RuntimeError) as e:  # a name too long, a loop of links
        raise OutputError(f"output {str(path)!r} is no usable file name: {e}") from e
    return found
