"""Where the files of a stream are: on this machine, or at an address of fsspec."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from qcompile.data.streams.extra_modules import INSTALL, import_extra
from qcompile.errors import DataError, QCompileError

_FAILURES_OF_ACCESS = re.compile(r"credential|permission|forbidden|access.?denied|\b40[13]\b", re.I)


@dataclass(frozen=True)
class StoredFile:
    """A file: its name as errors give it, its bytes, and a stamp that changes with its contents.

    ``size`` is None where a server does not say.
    """

    name: str
    size: int | None
    stamp: str
    open_binary: Callable[[], BinaryIO] = field(compare=False)


class Storage(Protocol):
    """Files by their paths. Raises DataError for what cannot be reached."""

    def match(self, pattern: str) -> list[str]:
        """The files that match a pattern, in any order."""

    def is_folder(self, path: str) -> bool:
        """Whether a folder is there."""

    def is_file(self, path: str) -> bool:
        """Whether a file is there."""

    def file(self, path: str) -> StoredFile:
        """The file of that path."""


class LocalStorage:
    """Files of this machine."""

    def match(self, pattern: str) -> list[str]:
        """The files that match a pattern; ``**`` stands for folders at any depth.

        As in a shell, ``*`` matches no name that begins with a dot.
        """
        parts = Path(pattern).parts
        fixed = next(i for i, part in enumerate(parts) if has_magic(part))
        root = Path(*parts[:fixed])
        with readable(pattern):
            found = [path for path in root.glob("/".join(parts[fixed:])) if path.is_file()]
        shown = [path for path in found if not _is_hidden(path.relative_to(root), pattern)]
        return [str(path) for path in shown]

    def is_folder(self, path: str) -> bool:
        """Whether a folder is there."""
        return Path(path).is_dir()

    def is_file(self, path: str) -> bool:
        """Whether a file is there."""
        return Path(path).is_file()

    def file(self, path: str) -> StoredFile:
        """The file of that path."""
        with readable(path):
            found = Path(path).stat()
        stamp = f"{found.st_mtime_ns} {found.st_ino}"
        return StoredFile(path, found.st_size, stamp, lambda: Path(path).open("rb"))


def has_magic(pattern: str) -> bool:
    """Whether this is a pattern, as of a shell."""
    return any(sign in pattern for sign in "*?[")


def names_stream(data: str) -> bool:
    """Whether this is an address or a pattern, by its look."""
    return is_address(data) or has_magic(data)


def is_address(data: str) -> bool:
    """Whether fsspec opens it."""
    return "://" in data


def _is_hidden(path: Path, pattern: str) -> bool:
    return "/." not in pattern and any(part.startswith(".") for part in path.parts)


class RemoteStorage:
    """Files at an address of fsspec, such as s3://bucket/folder. ``root``: the path in it."""

    def __init__(self, address: str) -> None:
        fsspec = import_extra(address, "fsspec")
        with readable(address):
            try:
                self._fs, self.root = fsspec.url_to_fs(address)
            except ImportError as e:
                raise DataError(f"{address}: {_package_of(address)}") from e

    def match(self, pattern: str) -> list[str]:
        """The files that match a pattern, by the rules of fsspec."""
        with readable(self._name(pattern)):
            found: dict[str, Any] = self._fs.glob(pattern, detail=True)
            return [path for path, info in found.items() if info["type"] == "file"]

    def is_folder(self, path: str) -> bool:
        """Whether a folder is there."""
        with readable(self._name(path)):
            return bool(self._fs.isdir(path))

    def is_file(self, path: str) -> bool:
        """Whether a file is there."""
        with readable(self._name(path)):
            return bool(self._fs.isfile(path))

    def file(self, path: str) -> StoredFile:
        """The file of that path."""
        name = self._name(path)
        with readable(name):
            info = self._fs.info(path)
        return StoredFile(name, info.get("size"), str(info), lambda: self._fs.open(path, "rb"))

    def _name(self, path: str) -> str:
        return str(self._fs.unstrip_protocol(path))


def _package_of(address: str) -> str:
    """What is missing to open an address."""
    from fsspec.registry import known_implementations

    known = known_implementations[address.partition("://")[0].rpartition("::")[2]]
    package = known["class"].partition(".")[0]
    install = INSTALL if package == "fsspec" else f"pip install {package}"
    return f"{known.get('err', package)}: {install}"


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Any error of files, formats and servers becomes a DataError of one line.

    Packages for storage raise exceptions of their own, without a common base.
    """
    try:
        yield
    except (QCompileError, MemoryError):
        raise
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    except FileNotFoundError as e:
        raise DataError(f"{name} does not exist") from e
    except Exception as e:
        raise DataError(f"{name} cannot be read: {_reason(e, name)}") from e


def _reason(error: Exception, name: str) -> str:
    kind = type(error).__name__
    message = (getattr(error, "strerror", None) or str(error) or kind).splitlines()[0]
    if is_address(name) and _FAILURES_OF_ACCESS.search(f"{kind} {message}"):
        return f"{message}: give credentials where the package for this storage reads them"
    if "range requests" in message:
        return f"the server sends no parts of files: simplecache::{name} downloads it first"
    return message
