"""Writes a model folder atomically: completely or not at all.

It is filled under a temporary name next to its destination, then swapped in with one system call.
An existing folder is replaced only if qcompile wrote everything in it: its manifest lists each
file.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qcompile import __version__
from qcompile.compiler.model_folder.layout import MANIFEST, Folder
from qcompile.errors import OutputError
from qcompile.system.atomic_write import umask

_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE
_CHUNK = 1 << 20


@contextmanager
def folder_to_fill(out: Path, source: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes ``out`` if the block ends without an exception.

    Raises OutputError: ``out`` cannot be made, holds files that qcompile did not write, or overlaps
    ``source``.
    """
    place = _destination(out, source)
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as e:
        raise OutputError(f"output folder {str(out)!r} cannot be made: {e.strerror}") from e
    try:
        yield stage
        stage.chmod(0o777 & ~umask())
        _swap(stage, place)
    except OSError as e:
        raise OutputError(f"cannot write folder {str(out)!r}: {e.strerror}") from e
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _destination(out: Path, source: Path) -> Path:
    """The resolved path of ``out``. Raises OutputError if writing it would lose other files."""
    try:
        place, origin = out.resolve(), source.resolve()
        if place.is_relative_to(origin) or origin.is_relative_to(place):
            hint = "; only --variant adds files to it" if place == origin else ""
            raise OutputError(
                f"output {str(out)!r} overlaps the input folder {str(source)!r}{hint}"
            )
        if not place.parent.is_dir():
            raise OutputError(f"output folder {str(out.parent)!r} does not exist")
        with suppress(FileNotFoundError):
            place.stat()  # since Python 3.14, exists() is False for a name that is too long
        if place.exists() and not place.is_dir():
            raise OutputError(f"output {str(out)!r} is a file, expected a folder name")
        foreign = _foreign(place) if place.is_dir() else None
    except (OSError, RuntimeError) as e:  # a name too long, a loop of links, no permission
        raise OutputError(f"output {str(out)!r} cannot be used as a folder name: {e}") from e
    if foreign is not None:
        raise OutputError(
            f"output folder {str(out)!r} exists and holds {foreign!r}, which qcompile did not "
            "write: give another name, or remove it"
        )
    return place


def _foreign(folder: Path) -> str | None:
    """A file in the folder that its manifest does not list, None where there is none."""
    try:
        listed = {MANIFEST, *json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    found = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return next((n for p in found if (n := p.relative_to(folder).as_posix()) not in listed), None)


def _swap(stage: Path, place: Path) -> None:
    """Move ``stage`` to ``place``; an old folder is then in ``stage``, to be removed."""
    if not place.exists():
        stage.rename(place)
    elif not _exchange(stage, place):
        # No exchange on this file system: two renames, the first undone if the second fails.
        aside = stage.with_name(f"{stage.name}.old")
        place.rename(aside)
        try:
            stage.rename(place)
        except BaseException:
            aside.rename(place)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that each name always refers to a complete folder.

    False if the C library or the file system does not support it. Raises OSError if it fails.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError):  # another C library; Windows has none that is called None
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def copy_companions(folder: Folder, stage: Path) -> None:
    """Copy configuration, tokenizer and documents; links are followed. Raises OutputError."""
    for name in folder.companions:
        target = stage / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, target)
        except OSError as e:
            raise OutputError(f"{str(folder.path / name)!r} cannot be copied: {e.strerror}") from e


def write_manifest(stage: Path, account: Mapping[str, Any]) -> None:
    """Write the manifest, the last file: ``account``, and the digest of each file."""
    files = {
        p.relative_to(stage).as_posix(): _digest(p) for p in sorted(stage.rglob("*")) if p.is_file()
    }
    text = json.dumps({"qcompile": __version__, **account, "files": files}, indent=1)
    (stage / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
