"""SHA-256 digests of files and models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from qcompile.errors import DataError, ModelError

_CHUNK = 1 << 20


def file_digest(path: Path) -> str:
    """Hex digest of a file, read in pieces. Raises DataError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
    except OSError as e:
        raise DataError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    return digest.hexdigest()


def model_digest(model: bytes | Path, external: Sequence[Path] = ()) -> str:
    """Hex digest of a model: of its bytes, or of its file and its external data files.

    Raises ModelError where a file cannot be read.
    """
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    try:
        own = file_digest(model)
        rest = [file_digest(path) for path in external]
    except DataError as e:
        raise ModelError(f"model {e}") from e
    return hashlib.sha256("".join([own, *rest]).encode()).hexdigest() if rest else own
