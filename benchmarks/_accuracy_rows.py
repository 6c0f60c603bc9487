"""What benchmarks/accuracy.py compiles: every row of its table, as settings of a recipe.

``recipe`` names the recipe that the settings are merged into; every other key is a key of a recipe.
In ``transforms``, ``default`` stands for the target's own passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from models._common import fail
from qcompile.compiler.config.recipe import Recipe, merge_settings, read_recipe
from qcompile.errors import RecipeError
from qcompile.rewriting.pipeline_spec import parse, parse_items
from qcompile.rewriting.registry import passes, target

GROUPS = ("cpu", "qdq", "ablation", "peers")
DEFAULT, NONE = "default", "none"
_ITEM = re.compile(r"[^,{]+(?:\{[^}]*\})?")


@dataclass(frozen=True)
class Row:
    """One model of the table, and the settings that it is compiled with."""

    group: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def _table(
    group: str, shared: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    return [Row(group, name, {**shared, **settings}) for name, settings in rows.items()]


_CPU: dict[str, dict[str, Any]] = {
    "cpu, default": {},
    "cpu, recipe fast": {"recipe": "fast"},
    "cpu, recipe per-tensor": {"recipe": "per-tensor"},
    "cpu, dynamic": {"mode": "dynamic"},
}
_ABLATION: dict[str, str] = {
    "no transforms": NONE,
    "permutation": "permute-channels",
    "2 groups, folded": "migrate-scales{groups=2}",
    "4 groups, folded": "migrate-scales{groups=4}",
    "6 groups, folded": "migrate-scales{groups=6}",
    "groups searched, folded": "migrate-scales",
    "permutation, 2 groups": "permute-channels,migrate-scales{groups=2}",
    "permutation, 4 groups": "permute-channels,migrate-scales{groups=4}",
    "permutation, 6 groups": "permute-channels,migrate-scales{groups=6}",
    "permutation, groups searched": "permute-channels,migrate-scales",
    "permutation, 2 groups split": "permute-channels,split-groups{groups=2}",
    "permutation, 4 groups split": "permute-channels,split-groups{groups=4}",
    "permutation, 6 groups split": "permute-channels,split-groups{groups=6}",
    "migration, SmoothQuant 0.5": "migrate-scales{strength=0.5}",
    "bias correction": "correct-bias",
    "rounding": "round-weights",
    "outlier columns": "split-outliers",
    "wider ranges": "widen-ranges",
    "default": DEFAULT,
    "default, bias correction": f"{DEFAULT},correct-bias",
}
_QDQ: dict[str, dict[str, Any]] = {
    "qdq, no transforms": {"transforms": NONE},
    "qdq, 2 groups": {"transforms": "group-scales{groups=2}"},
    "qdq, 4 groups": {"transforms": "group-scales{groups=4}"},
    "qdq, 6 groups": {"transforms": "group-scales{groups=6}"},
    "qdq, groups searched": {"transforms": "group-scales"},
    "qdq, default": {},
    "qdq, default, bias correction": {"transforms": f"{DEFAULT},correct-bias"},
    "paper-mp": {"recipe": "paper-mp"},
    "mixed-precision, groups searched": {"recipe": "mixed-precision", "transforms": "group-scales"},
}
ROWS = (
    *_table("cpu", {"target": "cpu"}, _CPU),
    *_table("qdq", {"target": "qdq"}, _QDQ),
    *_table(
        "ablation",
        {"target": "cpu"},
        {f"cpu: {name}": {"transforms": passes} for name, passes in _ABLATION.items()},
    ),
)


def groups_of(text: str) -> tuple[str, ...]:
    """The groups of a comma-separated list."""
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    for name in names:
        if name not in GROUPS:
            fail(f"--rows: unknown group {name!r}, expected some of {', '.join(GROUPS)}")
    return names


def recipe_of(row: Row) -> Recipe:
    """The row's recipe. Raises RecipeError."""
    settings = dict(row.settings)
    base = read_recipe(settings.pop("recipe")) if "recipe" in settings else Recipe()
    transforms = settings.get("transforms")
    if transforms == DEFAULT:
        settings["transforms"] = ""
    elif transforms is not None:
        own = target(settings.get("target", base.target)).transform.get("static", ())
        settings["transforms"] = expanded(transforms, own)
    return merge_settings(base, settings, f"row {row.name!r}")


def expanded(transforms: str, own: tuple[str, ...]) -> str:
    """The pipeline string with the target's own passes in place of ``default``.

    Each added pass comes as late as the order of passes allows; no pass comes twice.
    """
    first, *rest = _ITEM.findall(transforms)
    items = [*own] if first == DEFAULT else [first]
    for item in rest:
        if item not in items:
            items.insert(_last_valid_index(items, item), item)
    return ",".join(items) or NONE


def _last_valid_index(items: list[str], item: str) -> int:
    """The last index where ``item`` may be inserted; the end where there is none."""
    for at in range(len(items), -1, -1):
        with suppress(RecipeError):
            parse(",".join([*items[:at], item, *items[at:]]))
            return at
    return len(items)


def missing_passes(recipe: Recipe) -> list[str]:
    """Transforms that this version of qcompile does not have."""
    if recipe.transforms == NONE:
        return []
    return [n for n, _ in parse_items(recipe.transforms, "transforms") if n not in passes()]
