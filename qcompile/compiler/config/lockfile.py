"""A build as a file: enough to make the same bytes again without data, and readable.

``NAME.yaml`` holds versions, digests of inputs and output, the whole recipe, and each decision with
its scale. ``NAME.npz`` next to it holds the calibration (``calibration_file.py``); it is a separate
file because it is large. A light lock has none: a build from it calibrates again, with the same
data. Decisions are only for reading and comparing: a build derives them from the recipe and the
calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from qcompile import __version__
from qcompile.calibration import calibration_file
from qcompile.calibration.calibration_file import Calibration
from qcompile.compiler.config import recipe
from qcompile.compiler.config.recipe import LOCK, Recipe, load_yaml, merge_settings
from qcompile.errors import DataError, OutputError, RecipeError
from qcompile.planning.context import MODES
from qcompile.rewriting.registry import nearest
from qcompile.runtime import kernels
from qcompile.system import atomic_write, digests
from qcompile.targets.target import Mode

VERSION = 1
_SUFFIXES = (".yaml", ".yml")
_HEADING = "# The same bytes again{}: qcompile compile MODEL{} --recipe THIS.yaml -o OUT\n"
_WITHOUT, _WITH = (", without data", ""), (", from the same data", " --data DATA")
_TRAINED = "# Made by qcompile train, which alone can repeat it, from the same texts\n"
NOT_KEPT = (
    "too large to be kept here: a build calibrates again, from the same data; for a build without "
    "data: qcompile compile MODEL -o OUT --data DATA --lock FILE.yaml"
)


@dataclass(frozen=True)
class Lock:
    """One build. ``folder``: of the lock file and of the calibration file.

    model: name, bytes, sha256. data: sha256 of the feeds, their numbers, options that chose them,
    sha256 of the general text or None; None without data. output: bytes, sha256. verified: cosines
    of the outputs, None if they were not compared. calibration: file and sha256, or why it was not
    kept, and its account; None in modes without ranges. training: digests of its texts and its
    options, None where the model was not trained.
    """

    recipe: Recipe
    recipe_digest: str
    mode: Mode
    pipeline: str
    environment: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any] | None
    output: dict[str, Any]
    verified: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    decisions: tuple[dict[str, Any], ...] = ()
    folder: Path = field(default=Path())

    @property
    def is_light(self) -> bool:
        """True where a build needs the data, since the calibration was not kept."""
        return self.calibration is not None and "not_kept" in self.calibration

    def to_yaml(self) -> str:
        """The file's text, with one line per decision."""
        settings = {"format": LOCK, "version": VERSION}
        settings |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OTHERS}
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.recipe).items()}
        own |= {key: dict(getattr(self.recipe, key)) for key in ("dims", "forms", "gates")}
        own["precision"] = [list(pair) for pair in self.recipe.precision]
        heading = _HEADING.format(*(_WITH if self.is_light else _WITHOUT))
        if self.training is None:
            del settings["training"]
        else:
            heading = _TRAINED
        text = heading + yaml.safe_dump({**settings, "recipe": own}, sort_keys=False)
        rows = (yaml.safe_dump(d, **_LINE) for d in self.decisions)
        return text + "decisions:\n" + "".join(f"- {row}" for row in rows)

    def changes(self) -> list[str]:
        """Differences to the environment of the lock: versions, processor, the recipe's digest."""
        here = environment()
        differences = [
            f"{name} {then} there, {here.get(name)} here"
            for name, then in self.environment.items()
            if here.get(name) != then
        ]
        if self.recipe.digest() != self.recipe_digest:
            differences.append(
                "the recipe in the lock was edited, or means something else to this version"
            )
        return differences

    def read_calibration(self) -> Calibration | None:
        """The calibration, None in modes without ranges. Not for a light lock.

        Raises RecipeError where the file is missing, changed or damaged.
        """
        if self.calibration is None:
            return None
        path = self.folder / str(self.calibration["file"])
        try:
            digest = digests.file_digest(path)
            if digest != self.calibration["sha256"]:
                expected = str(self.calibration["sha256"])[:12]
                raise DataError(f"{str(path)!r} has sha256 {digest[:12]}…, expected {expected}…")
            return calibration_file.read_calibration(path)
        except DataError as e:
            raise RecipeError(f"the lock's calibration changed or is missing: {e}") from e

    def check_model(self, digest: str, name: str) -> None:
        """Raises RecipeError where another model was locked."""
        if digest != self.model["sha256"]:
            raise RecipeError(
                f"model {name!r} is not the one that was locked: sha256 {digest[:12]}…, expected "
                f"{str(self.model['sha256'])[:12]}… ({self.model['name']!r})"
            )


_OTHERS = ("recipe", "decisions", "folder")
_LINE: dict[str, Any] = {
    "default_flow_style": True, "sort_keys": False, "width": float("inf"), "allow_unicode": True,
}  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and processor: what the bytes of a build may depend on besides its inputs."""
    return {"qcompile": __version__, **kernels.environment().to_dict()}


def is_lock(source: str | Path) -> bool:
    """True for a file with the format line of a lock, whatever else is in it."""
    path = Path(source)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return path.suffix in _SUFFIXES and f"format: {LOCK}".encode() in head.splitlines()


def calibration_path(path: Path) -> Path:
    """The calibration file of a lock. Raises OutputError if the lock's suffix is not .yaml."""
    if path.suffix not in _SUFFIXES:
        raise OutputError(f"lock {str(path)!r}: expected a .yaml file")
    return path.with_suffix(".npz")


def save_lock(path: Path, lock: Lock, calibration: Calibration | None) -> None:
    """Write a lock and, before it, its calibration file; None writes a light lock.

    Raises OutputError.
    """
    if calibration is not None:
        data_path = calibration_path(path)
        with atomic_write.replacing(data_path) as file:
            calibration_file.write_calibration(file, calibration)
        entry = {"file": data_path.name, "sha256": digests.file_digest(data_path)}
        lock = replace(lock, calibration={**entry, **asdict(calibration.account)})
    atomic_write.write_atomic(path, lock.to_yaml().encode())


def recipe_of(source: Recipe | str | Path | None) -> Recipe:
    """A recipe by its name, from a file, or from a lock; None is all defaults.

    Raises RecipeError.
    """
    if source is None:
        return Recipe()
    if isinstance(source, Recipe):
        return source
    return read_lockfile(Path(source)).recipe if is_lock(source) else recipe.read_recipe(source)


def requested_lock(source: Recipe | str | Path | None, wanted: Recipe, where: str) -> Lock | None:
    """The lock that ``source`` names, None where it names or is a recipe.

    ``wanted``: its recipe after the settings from ``where`` were merged in. Raises RecipeError if
    they ask for another build than the lock's.
    """
    if source is None or isinstance(source, Recipe) or not is_lock(source):
        return None
    lock = read_lockfile(Path(source))
    for key in (f.name for f in fields(Recipe)):
        asked, locked = getattr(wanted, key), getattr(lock.recipe, key)
        if asked != locked:
            raise RecipeError(f"{where}: {key} is {asked!r}, but the lock says {locked!r}")
    return lock


def read_lockfile(path: Path) -> Lock:
    """Read and check a lock. Raises RecipeError: unreadable, unknown key, wrong type or version."""
    where = f"lock {str(path)!r}"
    content = load_yaml(path, "lock")
    if content.get("version") != VERSION:
        raise RecipeError(f"{where} has version {content.get('version')!r}, expected {VERSION}")
    known = [f.name for f in fields(Lock) if f.name != "folder"]
    for key in content:
        if key not in (*known, "format", "version"):
            raise RecipeError(f"{where} has unknown key {str(key)!r}{nearest(str(key), known)}")
    for key, kinds in _KINDS.items():
        if not isinstance(content.get(key), kinds):
            expected = " or ".join(_KIND_NAMES[k] for k in kinds)
            raise RecipeError(f"{where}: {key} is {content.get(key)!r}, expected {expected}")
    _check(content, where)
    settings = {k: content[k] for k in known if k in content}
    settings["recipe"] = _recipe(content["recipe"], where)
    settings["decisions"] = tuple(content["decisions"])
    return Lock(**settings, folder=path.parent)


_KIND_NAMES = {dict: "a mapping", str: "text", list: "a list", type(None): "nothing"}
_KINDS: dict[str, tuple[type, ...]] = {
    "recipe": (dict,),
    "recipe_digest": (str,),
    "mode": (str,),
    "pipeline": (str,),
    "environment": (dict,),
    "model": (dict,),
    "data": (dict, type(None)),
    "output": (dict,),
    "verified": (dict, type(None)),
    "calibration": (dict, type(None)),
    "training": (dict, type(None)),
    "decisions": (list,),
}


def _check(content: Mapping[str, Any], where: str) -> None:
    """Check the values that a build relies on. Raises RecipeError."""
    if content["mode"] not in MODES:
        raise RecipeError(
            f"{where}: unknown mode {content['mode']!r}{nearest(content['mode'], MODES)}"
        )
    needed = [("model", "sha256"), ("model", "name"), ("output", "sha256")]
    kept = content["calibration"]
    if kept is not None and "not_kept" in kept:
        needed += [("data", "sha256")]
    elif kept is not None:
        needed += [("calibration", "file"), ("calibration", "sha256")]
    for part, key in needed:
        if not isinstance((content[part] or {}).get(key), str):
            raise RecipeError(f"{where}: {part} has no {key}")
    name = (kept or {}).get("file")
    if name and Path(name).name != name:
        raise RecipeError(f"{where}: calibration file {name!r} is not in the lock's folder")


def _recipe(content: dict[str, Any], where: str) -> Recipe:
    """The lock's recipe. ``precision`` is a list of pairs, since a pattern may occur twice."""
    recipe = merge_settings(Recipe(), {k: v for k, v in content.items() if k != "precision"}, where)
    pairs = content.get("precision") or []
    if not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise RecipeError(f"{where}: precision is {pairs!r}, expected pairs of pattern and bits")
    try:
        return replace(recipe, precision=tuple((str(k), v) for k, v in pairs))
    except RecipeError as e:
        raise RecipeError(f"{where}: {e}") from e
