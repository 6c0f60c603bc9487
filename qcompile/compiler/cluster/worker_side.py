"""What runs in the process of a worker: kits by key, each opened once, and the items."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile import __version__
from qcompile.compiler.cluster.workers import Site
from qcompile.errors import ClusterError, DataError
from qcompile.runtime import kernels, session
from qcompile.system.digests import file_digest
from qcompile.system.temporary_folder import TemporaryFolder

Environment = dict[str, str]
# What each worker has, by key. One item runs at a time, with all threads of the worker.
_OPENED: dict[str, OpenedKit] = {}
_LOCK = threading.Lock()
_DIGESTS: dict[tuple[str, int, int], str] = {}  # path, size, time of change (ns)


def environment() -> Environment:
    """What the figures of an item may depend on: versions, and instruction sets of the kernels."""
    about = kernels.environment()
    return {
        "qcompile": __version__,
        "onnxruntime": about.onnxruntime,
        "numpy": about.numpy,
        "onnx": about.onnx,
        "instruction sets": f"{about.machine} {' '.join(about.isa)}",
    }


def difference(mine: Environment, other: Environment) -> str:
    """The first difference to the client's environment in words, empty if there is none."""
    for what, expected in mine.items():
        if other.get(what) != expected:
            return f"{what} {other.get(what, 'unknown')}, and the client has {expected}"
    return ""


@dataclass(frozen=True)
class SentFile:
    """A file of a kit: where the client has it. ``data``: its bytes, None on shared storage."""

    path: Path
    size: int
    digest: str
    data: bytes | None = None

    @classmethod
    def of(cls, path: Path) -> SentFile:
        """The file without its bytes."""
        return cls(path.resolve(), path.stat().st_size, known_digest(path))

    @property
    def is_here(self) -> bool:
        """True where this process can open the same file under its path."""
        try:
            same_size = self.path.stat().st_size == self.size
        except OSError:
            return False
        return same_size and known_digest(self.path) == self.digest


@dataclass(frozen=True)
class SentKit:
    """A kit as it travels: ``pickled`` are its functions, libraries: of custom operators."""

    files: Mapping[str, SentFile]
    pickled: bytes
    environment: Environment
    libraries: tuple[Path, ...] = ()


@dataclass
class OpenedKit:
    """A kit in a worker; its model is loaded for the first item."""

    kit: SentKit
    threads: int
    folder: TemporaryFolder | None = None
    _run: Callable[[Any], Any] | None = None
    _places: dict[str, Path] = field(default_factory=dict)

    def place_files(self) -> None:
        """Find or write the files. Raises ClusterError for one that is missing."""
        for name, file in self.kit.files.items():
            if file.data is None:
                if not file.is_here:
                    raise ClusterError(f"a worker cannot open {str(file.path)!r}")
                self._places[name] = file.path
            else:
                self.folder = self.folder or TemporaryFolder()
                place = self.folder.path / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.data)
                self._places[name] = place
        forget_data = {n: SentFile(f.path, f.size, f.digest) for n, f in self.kit.files.items()}
        self.kit = SentKit(forget_data, self.kit.pickled, self.kit.environment, self.kit.libraries)

    def run(self, item: Any) -> Any:
        """The answer to an item."""
        with session.custom_operators(self.kit.libraries):
            if self._run is None:
                unlike = difference(self.kit.environment, environment())
                if unlike:
                    raise ClusterError(f"a worker has {unlike}")
                opens, _ = pickle.loads(self.kit.pickled)
                self._run = opens(Site(self._places, self.threads))
            return self._run(item)

    def merge(self, answers: list[Any]) -> Any:
        """One answer, of those to consecutive items."""
        _, merges = pickle.loads(self.kit.pickled)
        return merges(answers)


def known_digest(path: Path) -> str:
    """Digest of a file, computed again only after a change."""
    about = path.stat()
    key = str(path), about.st_size, about.st_mtime_ns
    if key not in _DIGESTS:
        try:
            _DIGESTS[key] = file_digest(path)
        except DataError as e:
            raise ClusterError(str(e)) from e
    return _DIGESTS[key]


def files_here(files: list[SentFile]) -> bool:
    """True where this process can open all of them."""
    return all(file.is_here for file in files)


def install(key: str, kit: SentKit, threads: int) -> None:
    """Get ready for items of a kit."""
    opened = OpenedKit(kit, threads)
    opened.place_files()
    _OPENED[key] = opened


def remove(key: str) -> None:
    """Free the model of a kit."""
    with _LOCK:
        _OPENED.pop(key, None)


@dataclass(frozen=True)
class Answer:
    """``pickled`` is the result; ``seconds`` that it took, ``process``: who did it, ``items``: to
    how many it is the answer."""

    pickled: bytes
    seconds: float
    process: int
    items: int = 1


def run_item(key: str, pickled: bytes) -> Answer:
    """Do one item. Raises what the work does, ClusterError where the kit has not arrived."""
    with _LOCK:
        begun = time.monotonic()
        answer = pickle.dumps(_opened(key).run(pickle.loads(pickled)), protocol=5)
        return Answer(answer, time.monotonic() - begun, os.getpid())


def merge_answers(key: str, answers: list[Answer]) -> Answer:
    """One answer, of those to consecutive items. Raises what ``run_item`` does."""
    begun = time.monotonic()
    merged = _opened(key).merge([pickle.loads(a.pickled) for a in answers])
    pickled = pickle.dumps(merged, protocol=5)
    seconds = sum(a.seconds for a in answers) + time.monotonic() - begun
    return Answer(pickled, seconds, os.getpid(), sum(a.items for a in answers))


def _opened(key: str) -> OpenedKit:
    opened = _OPENED.get(key)
    if opened is None:
        raise ClusterError("a worker has not received its model; its log says why")
    return opened
