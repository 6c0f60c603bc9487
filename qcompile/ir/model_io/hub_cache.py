"""Snapshots in the cache of the Hugging Face hub, whose files are links to blobs.

The layout is that of huggingface_hub: ``models--ORG--NAME/snapshots/REVISION/FILE`` is a symbolic
link to ``models--ORG--NAME/blobs/HASH``.
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "models--"


def cache_repository(folder: Path) -> Path | None:
    """The folder of a repository in the cache, ``models--ORG--NAME``, of which ``folder`` is a
    snapshot; None for any other folder."""
    snapshots = folder.resolve().parent
    repository = snapshots.parent
    is_one = snapshots.name == "snapshots" and repository.name.startswith(PREFIX)
    return repository if is_one and (repository / "blobs").is_dir() else None


def repository_around(folder: Path) -> Path | None:
    """The same for a snapshot and for any folder in one, such as ``onnx``."""
    real = folder.resolve()
    return next(filter(None, map(cache_repository, (real, *real.parents))), None)
