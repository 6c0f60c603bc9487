"""Pipeline strings: ``fold-constants,fuse-gelu{approximate=true},insert-qdq``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import yaml

from qcompile.errors import RecipeError
from qcompile.rewriting.pass_base import Pass
from qcompile.rewriting.registry import build, passes
from qcompile.system import safe_yaml

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_ITEM = re.compile(r"\s*([\w.-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def parse(spec: str) -> tuple[Pass, ...]:
    """Passes of a pipeline string. Raises RecipeError: unknown name, option, type, bad order."""
    found = [build("pass", passes(), *item) for item in parse_items(spec, "pipeline")]
    if not found:
        raise RecipeError("the pipeline is empty")
    check_order(found)
    return tuple(found)


def parse_items(spec: str, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of ``name,name{option=value}``. Raises RecipeError on a syntax error."""
    items: list[tuple[str, dict[str, Any]]] = []
    position = 0
    while position < len(spec):
        match = _ITEM.match(spec, position)
        if match is None:
            raise RecipeError(f"{what} {spec!r} cannot be read from {spec[position:]!r} on")
        items.append((match[1], _options(match[2] or "")))
        position = match.end()
    return items


def check_order(found: Sequence[Pass]) -> None:
    """Stages never go back and ``after`` constraints hold. Raises RecipeError."""
    for earlier, later in pairwise(found):
        if later.stage < earlier.stage:
            raise RecipeError(
                f"pass {later.name!r} ({later.stage.name.lower()}) cannot follow "
                f"{earlier.name!r} ({earlier.stage.name.lower()})"
            )
    last = {p.name: i for i, p in enumerate(found)}
    for i, item in enumerate(found):
        for needed in item.after:
            if last.get(needed, -1) > i:
                raise RecipeError(f"pass {item.name!r} must come after {needed!r}")


def _options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise RecipeError(f"option {part!r} has no value, expected name=value")
        options[key.strip().replace("-", "_")] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    """A YAML scalar, or a number such as 1e-3, which YAML reads as text."""
    try:
        value = safe_yaml.load_yaml(text)
    except ValueError as e:
        raise RecipeError(f"option value {text!r} cannot be read") from e
    return float(text) if isinstance(value, str) and _EXPONENT.fullmatch(text) else value


def spell(found: Sequence[Pass]) -> str:
    """The pipeline string that ``parse`` reads back into the same passes."""
    return ",".join(_spell_one(p) for p in found)


def _spell_one(item: Pass) -> str:
    changed = [
        f"{f.name.replace('_', '-')}={yaml.safe_dump(getattr(item, f.name)).splitlines()[0]}"
        for f in dataclasses.fields(item)  # type: ignore[arg-type]
        if getattr(item, f.name) != f.default
    ]
    return item.name + (f"{{{','.join(changed)}}}" if changed else "")
