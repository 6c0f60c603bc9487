"""Adds files to a folder that holds others: each appears completely or not at all, nothing else
changes.

A file is replaced only if the folder's manifest lists it, with the digest that it has.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompile.compiler.model_folder.layout import MANIFEST
from qcompile.errors import OutputError
from qcompile.ir.model_io.hub_cache import repository_around
from qcompile.system import digests

_MERGED = ("files", "variants")  # by file name


@contextmanager
def folder_to_extend(out: Path, names: Collection[str]) -> Iterator[Path]:
    """A temporary folder to fill, with a manifest; its files get into ``out`` if the block ends
    without an exception, the manifest last.

    ``names``: those of the files that will be there. Raises OutputError: one of them exists and is
    not qcompile's, ``out`` cannot be written, or is a snapshot in the hub's cache.
    """
    if repository_around(out) is not None:
        raise OutputError(
            f"output {str(out)!r} is in the cache of the Hugging Face hub, where nothing is "
            "changed: give another folder (-o)"
        )
    old = _manifest(out)
    for name in names:
        _check_replaceable(out, name, old)
    try:
        stage = Path(tempfile.mkdtemp(prefix=".qcompile.", dir=out))
    except OSError as e:
        raise OutputError(f"folder {str(out)!r} cannot be written: {e.strerror}") from e
    try:
        yield stage
        new = json.loads((stage / MANIFEST).read_text(encoding="utf-8"))
        text = json.dumps(_merged(out, old, new), indent=1) + "\n"
        (stage / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
        _move(stage, out, sorted(new["files"]))
    except OSError as e:
        raise OutputError(f"cannot write into folder {str(out)!r}: {e.strerror}") from e
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _manifest(out: Path) -> dict[str, Any]:
    """The manifest of a folder, empty if it has none of ours."""
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(found, dict) and all(
        isinstance(found.get(key, {}), dict) for key in _MERGED
    )
    return found if is_ours else {}


def _check_replaceable(out: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Raises OutputError for a file that qcompile did not write, or that was changed since."""
    path = out / name
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{name!r} in folder {str(out)!r} is behind a link that leads out of it")
    if not path.exists() and not path.is_symlink():
        return
    known = manifest.get("files", {}).get(name)
    if path.is_symlink() or not path.is_file() or digests.file_digest(path) != known:
        raise OutputError(
            f"folder {str(out)!r} holds {name!r}, which qcompile did not write or which was "
            "changed since: remove it, or give another folder (-o)"
        )


def _merged(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run wrote about files that are still there, and what this one did."""
    merged = {**new, **old, "qcompile": new["qcompile"]}
    for key in _MERGED:
        kept = {name: text for name, text in old.get(key, {}).items() if (out / name).is_file()}
        merged[key] = dict(sorted((kept | new.get(key, {})).items()))
    return merged


def _move(stage: Path, out: Path, names: list[str]) -> None:
    """Reports and locks before models, so that a model always has its own; last the manifest."""
    for name in (*sorted(names, key=lambda n: n.endswith(".onnx")), MANIFEST):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).replace(out / name)
