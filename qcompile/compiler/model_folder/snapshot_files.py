"""Copies of the models of a snapshot in the hub's cache, as plain files.

A snapshot consists of symbolic links to the blobs of its repository. Readers of ONNX files follow
none out of a model's folder, and no hard links either, since such a link could lead anywhere; here
it is known where to.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePath, PurePosixPath

from qcompile.compiler.model_folder.layout import Folder
from qcompile.errors import ModelError, OutputError
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.external_data import inner_tensors, is_external
from qcompile.ir.model_io.hub_cache import repository_around


def place_models(folder: Folder, scratch: Path) -> None:
    """Put the models, and their external data, into ``scratch`` under the same names.

    Raises ModelError for data that is missing or outside of the repository's folder in the cache,
    OutputError where there is no room.
    """
    repository = repository_around(folder.path)
    assert repository is not None  # the caller checks it
    for name in folder.models:
        for file in (name, *_data_files(folder, name)):
            try:
                real = (folder.path / file).resolve(strict=True)
            except (OSError, RuntimeError, ValueError) as e:
                raise ModelError(f"{name}: its external data {file!r} is missing") from e
            if not real.is_relative_to(repository) or not real.is_file():
                raise ModelError(f"{name}: its external data {file!r} is not in the hub's cache")
            _place(real, scratch / file)


def _data_files(folder: Folder, name: str) -> list[str]:
    """Names of the files with a model's external data, in the model's folder or below it."""
    model, _ = read_model.read_model(folder.path / name)
    tensors = (*model.graph.initializer, *inner_tensors(model))
    entries = (e for t in tensors if is_external(t) for e in t.external_data)
    found = sorted({e.value for e in entries if e.key == "location"})
    for location in found:
        if _leaves_the_folder(location):
            raise ModelError(f"{name}: external data {location!r} is outside the model's folder")
    return [str(PurePosixPath(name).parent / location) for location in found]


def _leaves_the_folder(location: str) -> bool:
    path = PurePath(location)  # on Windows also of a drive, and with backslashes
    return bool(path.anchor) or ".." in path.parts


def _place(real: Path, path: Path) -> None:
    if path.exists():
        return  # shared by two models
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, path)
    except OSError as e:
        raise OutputError(f"{str(real)!r} cannot be copied: {e.strerror}") from e
