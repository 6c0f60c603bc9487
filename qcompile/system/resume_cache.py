"""Unfinished work on disk, so that the next run continues after an interrupt or a crash.

Entries are files ``KIND-KEY.EXT``; the key is a digest of everything that the contents depend on. A
finished run removes its own entries. Entries of abandoned runs are limited in size: the oldest are
removed first. A cache that cannot be read or written costs only time, so its errors become notes.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import platformdirs

from qcompile.errors import QCompileError
from qcompile.system.atomic_write import replacing

T = TypeVar("T")
LIMIT = 4 << 30
_KINDS = ("calibration", "partial", "search")


def default_folder() -> Path:
    """The system's place for caches of this user, such as ``~/.cache/qcompile``."""
    return platformdirs.user_cache_path("qcompile", appauthor=False)


def key_of(parts: Iterable[Any]) -> str:
    """Hex digest of JSON values."""
    text = json.dumps(list(parts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Cache:
    """Entries in one folder, at most ``limit`` bytes; ``notes`` say what went wrong.

    every: minimum seconds between checkpoints of one calibration, 0 for one after each feed.
    ``touched``: entries that this run looked up, ``own``: those that it wrote.
    """

    folder: Path
    limit: int = LIMIT
    every: float = 5.0
    notes: list[str] = field(default_factory=list)
    touched: set[Path] = field(default_factory=set)
    own: set[Path] = field(default_factory=set)

    def path(self, kind: str, key: str) -> Path:
        """The path of an entry, which need not exist."""
        path = self.folder / f"{kind}-{key[:32]}.{'json' if kind == 'search' else 'npz'}"
        self.touched.add(path)
        return path

    def load(self, kind: str, key: str, read: Callable[[Path], T]) -> T | None:
        """``read`` of an entry's path, None where there is no entry or it cannot be read."""
        path = self.path(kind, key)
        if not path.exists():
            return None
        try:
            return read(path)
        except QCompileError as e:
            self._note(f"a damaged entry of the cache is ignored: {e}")
            return None

    def store(self, kind: str, key: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write an entry atomically, then remove old entries over the limit."""
        path = self.path(kind, key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(path) as file:
                write(file)
        except (OSError, QCompileError) as e:
            self._note(f"nothing is kept for a run after an interrupt: {e}")
            return
        self.own.add(path)
        self._make_room()

    def is_own(self, kind: str, key: str) -> bool:
        """True where this run wrote the entry."""
        return self.path(kind, key) in self.own

    def drop(self, kind: str, key: str) -> None:
        """Remove an entry if it exists."""
        self._remove(self.path(kind, key))

    def forget(self) -> None:
        """Remove the entries of this run, and their partly written files from killed runs."""
        for path in sorted(self.touched):
            self._remove(path)
            for half in self.folder.glob(f".{glob.escape(path.name)}.*"):
                self._remove(half)
        self.touched.clear()

    def _make_room(self) -> None:
        """Remove the oldest entries over the limit, this run's last."""
        entries = []
        for path in self._entries():
            with suppress(OSError):
                status = path.stat()
                entries.append((path in self.touched, status.st_mtime, status.st_size, path))
        total = sum(size for *_, size, _ in entries)
        for _, _, size, path in sorted(entries):
            if total <= self.limit:
                return
            self._remove(path)
            total -= size

    def _entries(self) -> list[Path]:
        """All entries, and partly written files of killed runs (with a dot before the name)."""
        paths: list[Path] = []
        with suppress(OSError):
            paths = [p for k in _KINDS for p in self.folder.glob(f"{k}-*")]
            paths += [p for k in _KINDS for p in self.folder.glob(f".{k}-*")]
        return paths

    def _remove(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
