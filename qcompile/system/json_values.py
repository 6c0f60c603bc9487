"""Values as JSON has them: what commands print, and what is read back from it.

Dataclasses are objects, by default with a key for each field; where keys are others, the class says
so in ``JSON``. The schema (``tools/json_schema.py``) is made from the same classes and their type
hints. In ``Annotated[X, ...]`` a text describes the key, and a type is what JSON has in place of X.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

# Infinite, or not a number, is null.
Unbounded: TypeAlias = Annotated[float, float | None]


class Member(NamedTuple):
    """One key of an object: the attribute that it shows, whose ``absent`` says what None becomes:
    "null", "left out" or "{}"; key "**" shows the members of the attribute in its place."""

    key: str
    attribute: str
    absent: str = "null"


def members(names: str) -> tuple[Member, ...]:
    """Keys in their order: ``key``, ``key=attribute``, ``key=attribute.of.attribute``.

    With ``?`` at its end a key is left out where it is None, with ``{}`` it has an empty object
    then. ``**attribute`` stands for the members of another object.
    """
    return tuple(map(_member, names.split()))


def _member(word: str) -> Member:
    if word.startswith("**"):
        return Member("**", word[2:])
    key, _, attribute = word.removesuffix("?").removesuffix("{}").partition("=")
    absent = {"?": "left out", "}": "{}"}.get(word[-1], "null")
    return Member(key, attribute or key, absent)


class Record:
    """A dataclass that says in ``JSON`` which keys it has; properties may be among them."""

    JSON: ClassVar[tuple[Member, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        found: dict[str, Any] = plain(self)
        return found


@cache
def members_of(cls: type[Any]) -> tuple[Member, ...]:
    """The keys of a dataclass or named tuple."""
    own: tuple[Member, ...] = getattr(cls, "JSON", ())
    names = getattr(cls, "_fields", None) or [f.name for f in fields(cls)]
    return own or tuple(Member(name, name) for name in names)


def plain(value: Any) -> Any:
    """Objects, lists and scalars; None for infinities and NaN, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) or hasattr(value, "_fields"):
        return _object(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _object(value: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    kind: Any = type(value)
    for key, attribute, absent in members_of(kind):
        found = attrgetter(attribute)(value)
        if key == "**":
            made |= _object(found)
        elif found is not None or absent == "null":
            made[key] = plain(found)
        elif absent == "{}":
            made[key] = {}
    return made


def read(hint: Any, value: Any) -> Any:
    """The inverse of ``plain``: a value of the type of ``hint``, which may hold dataclasses.

    Keys that no field has are passed over. Raises TypeError where a value is of another type, or
    one without a default is missing.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return read(args[0], value)
    if origin in (Union, UnionType):
        return None if value is None else read(next(a for a in args if a is not NoneType), value)
    if is_dataclass(hint):
        return _record(hint, value)
    kind: Any = {float: int | float}.get(hint, hint)
    if origin in (list, tuple):
        kind = list
    elif origin is Literal:
        kind = str
    if not isinstance(value, kind):
        raise TypeError(f"found {value!r}, expected {hint}")
    made = [read(args[0], v) for v in value] if kind is list else value
    return tuple(made) if origin is tuple else made


def _record(cls: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"found {value!r}, expected an object")
    hints = _hints(cls)
    shown = {a: value[key] for key, a, _ in members_of(cls) if key in value and a in hints}
    return cls(**{a: read(hints[a], found) for a, found in shown.items()})


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)
