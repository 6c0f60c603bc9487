"""Models by their name on the Hugging Face hub: what of them is wanted, through its own cache."""

from __future__ import annotations

import re
from pathlib import Path

from qcompile.compiler.model_folder import layout
from qcompile.compiler.model_folder.layout import Folder
from qcompile.errors import ModelError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WANTED = ["*.json", "*.txt", "*.model", "*.spm", "*.md", "LICENSE*", "*.safetensors"]
_OTHER_FORMS = ["onnx/*", "openvino/*", "*.onnx*"]


def fetch_folder(name: str, revision: str | None) -> Folder:
    """The folder of a model, downloaded where it is not yet there; pickles and code are left there.

    Raises ModelError: no name of a model, not there, no network.
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
                allow_patterns=_WANTED,
                ignore_patterns=_OTHER_FORMS,
            )
        )
    except Exception as e:  # of the network, of the hub, of the cache
        said = str(e).strip().splitlines()
        raise ModelError(
            f"{name!r} is no folder, and the Hugging Face hub does not give it; without network "
            f"copy the model's folder here and name that: {said[0] if said else type(e).__name__}"
        ) from e
    return layout.read_folder(path, within=path.parent.parent)  # the cache links to its own blobs
