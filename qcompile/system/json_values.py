"""Conversion between dataclasses and JSON values, for what commands print and read back.

A dataclass becomes an object, by default with one key per field; other keys are listed in its
``JSON``. The schema (``tools/json_schema.py``) is made from the same classes and type hints. In
``Annotated[X, ...]``, a string describes the key, and a type is what JSON has in place of X.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import PurePath
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

# Infinity and NaN become null.
Unbounded: TypeAlias = Annotated[float, float | None]


class Member(NamedTuple):
    """One key of an object, and the attribute with its value.

    ``absent``: what None becomes, "null", "left out" or "{}". Key "**" stands for the members of
    the attribute.
    """

    key: str
    attribute: str
    absent: str = "null"


def members(names: str) -> tuple[Member, ...]:
    """Keys in order, from words ``key``, ``key=attribute`` or ``key=attribute.of.attribute``.

    A word that ends in ``?`` is left out where it is None, one that ends in ``{}`` becomes an empty
    object then. ``**attribute`` stands for the members of another object.
    """
    return tuple(map(_member, names.split()))


def _member(word: str) -> Member:
    if word.startswith("**"):
        return Member("**", word[2:])
    key, _, attribute = word.removesuffix("?").removesuffix("{}").partition("=")
    absent = {"?": "left out", "}": "{}"}.get(word[-1], "null")
    return Member(key, attribute or key, absent)


class Record:
    """A dataclass with its JSON keys in ``JSON``; they may show properties too."""

    JSON: ClassVar[tuple[Member, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values: dicts, lists and scalars."""
        values: dict[str, Any] = json_value(self)
        return values


@cache
def members_of(cls: type[Any]) -> tuple[Member, ...]:
    """The keys of a dataclass or named tuple."""
    own: tuple[Member, ...] = getattr(cls, "JSON", ())
    names = getattr(cls, "_fields", None) or [f.name for f in fields(cls)]
    return own or tuple(Member(name, name) for name in names)


def json_value(value: Any) -> Any:
    """A value as dicts, lists and scalars; None for infinity and NaN, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) or hasattr(value, "_fields"):
        return _object(value)
    if isinstance(value, Mapping):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    return value.as_posix() if isinstance(value, PurePath) else value


def _object(value: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    kind: Any = type(value)
    for key, attribute, absent in members_of(kind):
        member = attrgetter(attribute)(value)
        if key == "**":
            shown |= _object(member)
        elif member is not None or absent == "null":
            shown[key] = json_value(member)
        elif absent == "{}":
            shown[key] = {}
    return shown


def from_json(hint: Any, value: Any) -> Any:
    """The inverse of ``json_value``: a value of type ``hint``, which may contain dataclasses.

    Keys without a field are ignored. Raises TypeError where a value is of another type, or one
    without a default is missing.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if value is None and get_args(Unbounded)[1] in args[1:]:
            return math.nan
        return from_json(args[0], value)
    if origin in (Union, UnionType):
        return (
            None if value is None else from_json(next(a for a in args if a is not NoneType), value)
        )
    if is_dataclass(hint):
        return _record(hint, value)
    kind: Any = {float: int | float}.get(hint, hint)
    if origin in (list, tuple):
        kind = list
    elif origin is Literal:
        kind = str
    if not isinstance(value, kind):
        raise TypeError(f"found {value!r}, expected {hint}")
    items = [from_json(args[0], v) for v in value] if kind is list else value
    return tuple(items) if origin is tuple else items


def _record(cls: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"found {value!r}, expected an object")
    hints = _hints(cls)
    found = {a: value[key] for key, a, _ in members_of(cls) if key in value and a in hints}
    return cls(**{a: from_json(hints[a], member) for a, member in found.items()})


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)
