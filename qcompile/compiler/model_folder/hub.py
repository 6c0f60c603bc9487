"""Downloads models by their name on the Hugging Face hub, into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from qcompile.compiler.model_folder import layout
from qcompile.compiler.model_folder.layout import Folder
from qcompile.errors import ModelError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.spm", "*.md", "LICENSE*", "*.safetensors"]
_OTHER_FORMATS = ["onnx/*", "openvino/*", "*.onnx*"]


def fetch_folder(name: str, revision: str | None) -> Folder:
    """The folder of a model, downloaded if it is not in the cache; pickles and code never are.

    Raises ModelError: not a model's name, not on the hub, no network.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"{name!r} is neither a folder nor a model's name on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ModelError(f"models from the hub need huggingface_hub: {e}") from e
    try:
        path = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_DOWNLOADED,
                ignore_patterns=_OTHER_FORMATS,
            )
        )
    except Exception as e:  # of the network, of the hub, of the cache
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ModelError(
            f"{name!r} is not a folder, and cannot be downloaded from the Hugging Face hub; "
            f"without network copy the model's folder here and name that: {lines[0]}"
        ) from e
    return layout.read_folder(path, within=path.parent.parent)  # the cache links to its own blobs
