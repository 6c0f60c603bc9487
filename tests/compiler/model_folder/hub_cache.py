"""A repository in the cache of the Hugging Face hub, as huggingface_hub lays it out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

from tests.compiler.model_folder.written_folder import encoder, write_folder

REVISION = "0123456789abcdef0123456789abcdef01234567"


def written_snapshot(cache: Path, *, threshold: int) -> Path:
    """A snapshot with onnx/model.onnx, whose weights of ``threshold`` bytes and more are in
    onnx/model.onnx_data; all of its files are links."""
    root = write_folder(cache / "in")
    (root / "model.onnx").unlink()
    (root / "onnx").mkdir()
    onnx.save(
        encoder(), root / "onnx" / "model.onnx", save_as_external_data=True,
        location="model.onnx_data", size_threshold=threshold,
    )  # fmt: skip
    return put_into_cache(cache, [p for p in root.rglob("*") if p.is_file()], root)


def put_into_cache(cache: Path, files: Iterable[Path], root: Path) -> Path:
    """Move files of a folder into the cache as some/model, and return the snapshot's folder."""
    repository = cache / "models--some--model"
    snapshot = repository / "snapshots" / REVISION
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for i, file in enumerate(sorted(files)):
        link = snapshot / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = file.rename(repository / "blobs" / str(i))
        up = "../" * len(link.relative_to(repository).parent.parts)
        link.symlink_to(f"{up}{blob.relative_to(repository)}")
    return snapshot
