"""Finds passes, calibrators and targets: by walking their folders, and by entry points.

A new file in ``passes/`` is a new pass: no table to edit. Third parties register classes under the
entry point groups ``qcompile.passes``, ``qcompile.calibrators`` and ``qcompile.targets``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeVar

from qcompile.errors import RecipeError, TargetError
from qcompile.quant import Calibrator
from qcompile.rewriting.pass_base import Pass
from qcompile.targets.target import Target

T = TypeVar("T")


@cache
def passes() -> Mapping[str, type[Pass]]:
    """Registered passes by name, sorted."""
    return _by_name("pass", _classes("qcompile.passes", Pass))


@cache
def calibrators() -> Mapping[str, type[Calibrator]]:
    """Registered calibrators by name, sorted."""
    return _by_name("calibrator", _classes("qcompile.calibrators", Calibrator))


@cache
def targets() -> Mapping[str, Target]:
    """Registered targets by name, sorted."""
    found = [t for m in _modules("qcompile.targets") for t in vars(m).values()]
    extra = [entry.load() for entry in entry_points(group="qcompile.targets")]
    return _by_name("target", [t for t in (*found, *extra) if isinstance(t, Target)])


def target(name: str) -> Target:
    """The target of that name; raises TargetError with the nearest name."""
    if name not in targets():
        raise TargetError(f"unknown target {name!r}{nearest(name, targets())}")
    return targets()[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that ends a message about an unknown name."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of: {', '.join(names)}"


def build(kind: str, classes: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """An instance from a name and options. Raises RecipeError on an unknown name or option."""
    if name not in classes:
        raise RecipeError(f"unknown {kind} {name!r}{nearest(name, classes)}")
    cls = classes[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in fields:
            hint = nearest(key, fields) if fields else ", it has no options"
            raise RecipeError(f"{kind} {name!r} has no option {key!r}{hint}")
        _check_type(f"option {key!r} of {kind} {name!r}", value, str(fields[key].type))
    try:
        return cls(**options)
    except ValueError as e:
        raise RecipeError(f"{kind} {name!r}: {e}") from e


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def _check_type(what: str, value: object, wanted: str) -> None:
    accepted = _TYPES.get(wanted)
    is_flag = isinstance(value, bool) and wanted != "bool"  # in Python, True is an int
    if accepted is not None and (not isinstance(value, accepted) or is_flag):
        raise RecipeError(f"{what} is {value!r}, expected {wanted}")


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    found = pkgutil.walk_packages(root.__path__, f"{package}.")
    for name in sorted((i.name for i in found), key=lambda n: n.rpartition(".")[2]):
        if not name.rpartition(".")[2].startswith("_"):
            yield importlib.import_module(name)


def _classes(group: str, base: type[T]) -> list[type[T]]:
    found: list[type[T]] = []
    for module in _modules(group):
        own = (c for c in vars(module).values() if isinstance(c, type))
        found += [c for c in own if issubclass(c, base) and c.__module__ == module.__name__]
    return found + [entry.load() for entry in entry_points(group=group)]


def _by_name(kind: str, items: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        if item.name in found:
            raise RecipeError(f"{kind} {item.name!r} is registered twice")
        found[item.name] = item
    return dict(sorted(found.items()))
