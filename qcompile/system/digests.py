"""SHA-256 of what goes into a build: files of a model, feeds as they stream by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from qcompile.errors import DataError, ModelError

_CHUNK = 1 << 20


def of_file(path: Path) -> str:
    """Hex digest of a file, read in pieces. Raises DataError where it cannot be read."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                found.update(piece)
    except OSError as e:
        raise DataError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    return found.hexdigest()


def of_model(model: bytes | Path, external: Sequence[Path] = ()) -> str:
    """Hex digest of a model: of its bytes, or of its file and then of what lies outside it.

    Raises ModelError where a file cannot be read.
    """
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    try:
        own = of_file(model)
        rest = [of_file(path) for path in external]
    except DataError as e:
        raise ModelError(f"model {e}") from e
    return hashlib.sha256("".join([own, *rest]).encode()).hexdigest() if rest else own
