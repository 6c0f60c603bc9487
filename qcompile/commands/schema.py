"""qcompile schema [NAME]"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from qcompile.commands._names import Names
from qcompile.compiler import report
from qcompile.compiler.config.recipe_schema import recipe_schema
from qcompile.errors import RecipeError
from qcompile.rewriting.registry import nearest

_FILE = Path(report.__file__).parent / "schemas" / "output.json"
_RECIPE, _REPORT = "recipe", "report"


@click.command()
@click.argument("name", required=False, type=Names("NAME", lambda: names()))
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def schema(name: str | None, verbose: bool) -> None:
    """Print a JSON Schema: of recipes (`recipe`), reports (`report`) or what --json prints.

    Without NAME, list the names. Editors complete and check recipes with the schema.
    """
    if name is None:
        click.echo("\n".join(names()))
        return
    if name not in names():
        raise RecipeError(f"unknown schema {name!r}{nearest(name, names())}")
    found = recipe_schema() if name == _RECIPE else _of_output(name)
    click.echo(json.dumps(found, indent=1, ensure_ascii=False))


def names() -> list[str]:
    """What there are schemas of: recipes, reports, and the JSON of each command."""
    definitions = json.loads(_FILE.read_text(encoding="utf-8"))["$defs"]
    return [_RECIPE, _REPORT, *(name for name in definitions if name.islower())]


def _of_output(name: str) -> dict[str, Any]:
    """One definition of the schema of outputs, with the definitions that it refers to."""
    whole = json.loads(_FILE.read_text(encoding="utf-8"))
    title = f"qcompile {name}" if name == _REPORT else f"qcompile {name} --json"
    start = "compile" if name == _REPORT else name
    known = whole["$defs"]
    used = {start}
    while more := {r for u in used for r in _references(known[u])} - used:
        used |= more
    definitions = {name: known[name] for name in known if name in used}
    return {"$schema": whole["$schema"], "title": title, "$ref": f"#/$defs/{start}",
            "$defs": definitions}  # fmt: skip


def _references(part: Any) -> Iterator[str]:
    """Names of the definitions that a part of a schema refers to."""
    if isinstance(part, dict) and isinstance(part.get("$ref"), str):
        yield part["$ref"].rpartition("/")[2]
    if isinstance(part, dict | list):
        for item in part.values() if isinstance(part, dict) else part:
            yield from _references(item)
