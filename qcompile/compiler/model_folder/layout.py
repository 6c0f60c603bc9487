"""Model folders in transformers/optimum layout: which files they hold, and which of them are used.

A folder may come from anywhere, so nothing in it is trusted. Only files of known kinds are used;
pickles, which run code when opened, and Python files are neither opened nor copied. A link out of
the folder is refused if the file would be used. Files that are passed over are reported with the
reason.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qcompile.errors import ModelError
from qcompile.ir import Refusal
from qcompile.ir.model_io.hub_cache import PREFIX, cache_repository, repository_around
from qcompile.system.json_values import Record, members

MANIFEST = "qcompile.json"
TOKENIZER = "tokenizer.json"
_DEPTH = 3  # of nested folders: deeper than any layout in use
_MOST = 10_000  # files
_COMPANIONS = frozenset(
    (".bpe", ".codes", ".jinja", ".json", ".md", ".model", ".spm", ".tiktoken", ".txt", ".vocab")
)
_COMPANION_NAMES = ("LICENSE", "NOTICE")
_PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_CODE = (".dll", ".dylib", ".py", ".pyc", ".sh", ".so")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_REGENERATED = (".lock.npz", ".lock.yaml", ".report.json", ".search.json", ".index.json")
# Files that optimum, sentence-transformers and transformers.js derive from a model next to them.
_VARIANT = re.compile(r"(.+)_(O[1-4]|bnb4|fp16|(q|u|qu)?int8(_.*)?|q4(f16)?|quantized)$")


@dataclass(frozen=True)
class Skipped:
    """A file that is passed over, by its name in the folder, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Folder(Record):
    """Files of a folder, as sorted relative names with ``/``.

    models: ONNX files to compile. companions: configuration, tokenizer, documents, which are
    copied. weights: safetensors at the top level, from which a model can be exported.
    """

    path: Path
    models: tuple[str, ...]
    companions: tuple[str, ...]
    weights: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    JSON = members("copied=companions passed_over")

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer for text data, None if there is none."""
        return self.path if TOKENIZER in self.companions else None

    @property
    def passed_over(self) -> dict[str, str]:
        """Files that are neither compiled nor copied, and why."""
        return {s.name: s.reason for s in self.skipped}


def read_folder(path: Path, within: Path | None = None) -> Folder:
    """Read a folder; its links must lead to places ``within``, by default the folder itself.

    A snapshot in the cache of the Hugging Face hub consists of links into its repository's folder
    there, which are followed. Raises ModelError: unreadable, over 10,000 files, a link that leads
    out.
    """
    root = path.resolve()
    within = (repository_around(root) or root) if within is None else within.resolve()
    used: dict[str, list[str]] = {"model": [], "companion": [], "weights": []}
    skipped = []
    for file in _files(root):
        name = file.relative_to(root).as_posix()
        kind = _kind(name, file)
        if isinstance(kind, Refusal):
            skipped.append(Skipped(ascii(name)[1:-1], kind.reason))
        else:
            _check_link(name, file, root, within)
            used[kind].append(name)
    models, variants = _without_variants(used["model"], bool(used["weights"]), _made(root))
    return Folder(
        path,
        tuple(models),
        tuple(used["companion"]),
        tuple(used["weights"]),
        tuple(sorted([*skipped, *variants], key=lambda s: s.name)),
    )


def cached_name(folder: Path) -> str | None:
    """The name on the hub, ORG/NAME, of a snapshot in its cache; None for any other folder."""
    repository = cache_repository(folder)
    if repository is None:
        return None
    return repository.name.removeprefix(PREFIX).replace("--", "/", 1)


def _files(root: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, in order; linked folders count as files."""
    count = 0
    for place, folders, files in os.walk(root, onerror=_unreadable):
        here = Path(place)
        depth = len(here.relative_to(root).parts)
        linked = [f for f in folders if (here / f).is_symlink()]
        entered = [f for f in folders if f not in linked and not f.startswith(".")]
        folders[:] = sorted(entered) if depth < _DEPTH else []
        for name in sorted([*files, *linked]):
            count += 1
            if count > _MOST:
                raise ModelError(
                    f"folder {str(root)!r} holds over {_MOST} files: not a model folder"
                )
            yield here / name


def _unreadable(e: OSError) -> None:
    raise ModelError(f"folder {str(e.filename)!r} cannot be read: {e.strerror}") from e


def _kind(name: str, file: Path) -> str | Refusal:
    """What a file is for, or why it is passed over."""
    base, suffix = file.name, file.suffix.lower()
    if base.startswith("."):
        return Refusal("hidden")
    if not name.isprintable():
        return Refusal("its name cannot be printed")
    if suffix in _PICKLES:
        return Refusal("may be a pickle, which runs code when opened")
    if suffix in _CODE:
        return Refusal("code")
    if base.endswith(_WEIGHTS) and "/" not in name:
        return _irregular(file) or "weights"
    if base == MANIFEST or base.endswith(_REGENERATED):
        return Refusal("describes files that are written again")
    if suffix == ".onnx":
        return _irregular(file) or "model"
    # In subfolders safetensors are sentence-transformers modules, which run after the ONNX model.
    if suffix in (*_COMPANIONS, ".safetensors") or base.startswith(_COMPANION_NAMES):
        return _irregular(file) or "companion"
    return Refusal("not a file of an ONNX model")


def _irregular(file: Path) -> Refusal | None:
    if file.is_file() or file.is_symlink():
        return None
    return Refusal("a device, socket or pipe")


def _check_link(name: str, file: Path, root: Path, within: Path) -> None:
    """Raises ModelError if a file that would be used is a link out of the folder or to no file."""
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError) as e:
        raise ModelError(f"{name!r} in folder {str(root)!r} is a broken link") from e
    if not real.is_relative_to(within):
        raise ModelError(
            f"{name!r} in folder {str(root)!r} is a link that leads out of it, which is not "
            "followed; copy the folder with its files: cp -rL"
        )
    if not real.is_file():
        raise ModelError(f"{name!r} in folder {str(root)!r} is a link to something that is no file")


def _made(root: Path) -> frozenset[str]:
    """The variants that the folder's manifest lists, which may say anything."""
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return frozenset()
    listed = found.get("variants") if isinstance(found, dict) else None
    return frozenset(listed) if isinstance(listed, dict) else frozenset()


def _without_variants(
    names: list[str], has_weights: bool, made: frozenset[str]
) -> tuple[list[str], list[Skipped]]:
    """Skip ``model_quantized.onnx`` and the like of ``model.onnx``: it is the same model.

    Those of a model at the top may be in ``onnx/``. ``made``: variants of the folder, skipped
    unless there is nothing else to compile: no other model, and no weights to export one from.
    """
    others = [name for name in names if name not in made]
    if not others and not has_weights:
        return names, []
    skipped = [Skipped(name, "a variant that qcompile made") for name in names if name in made]
    kept = []
    for name in others:
        match = _VARIANT.match(name.removesuffix(".onnx"))
        stem = "" if match is None else match[1]
        originals = (f"{stem}.onnx", f"{stem.removeprefix('onnx/')}.onnx")
        original = next((o for o in originals if match and o in names), None)
        if original is not None:
            skipped.append(Skipped(name, f"a converted version of {original}"))
        else:
            kept.append(name)
    return kept, skipped
