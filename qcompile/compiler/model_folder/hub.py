"""Models on the Hugging Face hub: downloads into the hub's own cache, and uploads of a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.compiler.model_folder import layout
from qcompile.compiler.model_folder.layout import Folder
from qcompile.errors import ModelError, OutputError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TEXT = ["*.json", "*.txt", "*.model", "*.spm", "*.md", "LICENSE*"]
_WEIGHTS = [*_TEXT, "*.safetensors"]
_OTHER_FORMATS = ["onnx/*", "openvino/*", "*.onnx*"]
# A pattern's * stands for slashes too. Safetensors in folders are modules behind the model.
_ONNX = [*_TEXT, "*/*.safetensors", "*.onnx", "*.onnx_data*", "*.onnx.data"]
_CONVERTED = [
    "openvino/*", "*_O[1-4].onnx*", "*int8*.onnx*", "*_fp16.onnx*", "*_q4*.onnx*", "*_bnb4.onnx*",
    "*_quantized.onnx*",
]  # fmt: skip
_HIDDEN = "***"


@dataclass(frozen=True)
class Source:
    """A folder to compile. name: as reports call it. hub_name: on the hub, None if unknown."""

    folder: Folder
    name: str
    hub_name: str | None


def find_source(source: str | Path, revision: str | None = None) -> Source:
    """A local folder, or the folder of a model on the hub, downloaded if it is not in the cache.

    Raises ModelError where it is neither, cannot be downloaded, or is local and has a ``revision``.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ModelError(
                f"{str(source)!r} is a local folder, which has no revision {revision!r}: "
                "--revision is for models on the Hugging Face hub"
            )
        name = layout.cached_name(path)
        return Source(layout.read_folder(path), name or path.resolve().name, name)
    return Source(fetch_folder(str(source), revision, onnx=True), str(source), str(source))


def may_be_name(source: str | Path) -> bool:
    """True for what is no file and no folder here, but could be a model's name on the hub."""
    path = Path(source)
    is_file = path.exists() or path.suffix == ".onnx"
    return not is_file and _NAME.fullmatch(str(source)) is not None


def fetch_folder(name: str, revision: str | None, *, onnx: bool = False) -> Folder:
    """The folder of a model, downloaded if it is not in the cache; pickles and code never are.

    ``onnx``: its float ONNX files where it has any, in place of the weights of torch. Raises
    ModelError: not a model's name, not on the hub, no network.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"{name!r} is neither a folder nor a model's name on the Hugging Face hub")
    if onnx:
        folder = _snapshot(name, revision, _ONNX, _CONVERTED)
        if folder.models:
            return folder
    return _snapshot(name, revision, _WEIGHTS, _OTHER_FORMATS)


def _snapshot(
    name: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str]
) -> Folder:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ModelError(f"models from the hub need huggingface_hub: {e}") from e
    try:
        path = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
            )
        )
    except Exception as e:  # of the network, of the hub, of the cache
        raise ModelError(
            f"{name!r} is neither a file nor a folder here, and cannot be downloaded from the "
            "Hugging Face hub; "
            f"without network copy the model's folder here and name that: {_first_line(e)}"
        ) from e
    return layout.read_folder(path, within=path.parent.parent)  # the cache links to its own blobs


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def check_push(repository: str) -> None:
    """Raises OutputError, before any work is done, for what cannot be uploaded to."""
    if not _REPOSITORY.fullmatch(repository):
        raise OutputError(f"--push {repository!r}: expected a repository, ORG/NAME")
    if not _client().token and _saved_token() is None:
        raise OutputError(
            f"--push {repository!r} needs a token of the Hugging Face hub: hf auth login, or the "
            "environment variable HF_TOKEN"
        )


def push(repository: str, folder: Path, names: Sequence[str], message: str) -> str:
    """Upload files of a folder in one commit, and return its address; no other file is touched.

    A repository that does not exist is made. Raises OutputError, which never shows the token.
    """
    client = _client()
    try:
        from huggingface_hub import CommitOperationAdd

        client.create_repo(repository, exist_ok=True)
        files = [CommitOperationAdd(name, folder / name) for name in names]
        commit = client.create_commit(repository, files, commit_message=message)
        return str(commit.commit_url)
    except Exception as e:  # of the network, of the hub
        reason = _first_line(e)
        for token in {client.token, _saved_token()} - {None, False, True, ""}:
            reason = reason.replace(str(token), _HIDDEN)
    # Outside of the block: a traceback (-v) would show the cause, which may hold the token.
    raise OutputError(
        f"{str(folder)!r} is written, but cannot be uploaded to {repository!r}: {reason}"
    )


def _client() -> Any:
    """The client of the hub, with the user's own settings."""
    try:
        from huggingface_hub import HfApi
    except ImportError as e:
        raise OutputError(f"--push needs huggingface_hub (extra 'hub'): {e}") from e
    return HfApi(library_name="qcompile")


def _saved_token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token
