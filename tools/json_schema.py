"""Writes the JSON schema of the output of ``--json``: compiler/report/schemas/output.json.

That of recipes, which the package makes, is written to docs/recipe.schema.json for editors.

It is derived from the dataclasses that the commands print: keys as ``json_values`` writes them,
types from hints, descriptions from docstrings and from texts in ``Annotated``. After a change to
one of these run ``python -m tools.json_schema``; a test compares the file.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import qcompile
from qcompile.commands.inspect import Inspection
from qcompile.commands.plugins import CalibratorRow, PassRow, TargetRow
from qcompile.commands.recipes import RecipeRow
from qcompile.compiler.config.recipe_schema import recipe_schema
from qcompile.compiler.model_folder.torch_export import ExportAccount
from qcompile.compiler.model_folder.write_folder import CompiledFolder
from qcompile.compiler.report.model_diff import Difference
from qcompile.compiler.report.report import Report
from qcompile.compiler.search.policy import Ranking
from qcompile.runtime.evaluation.closeness import Verdict
from qcompile.runtime.latency import Comparison
from qcompile.system.json_values import Member, members_of

FILE = Path(qcompile.__file__).parent / "compiler" / "report" / "schemas" / "output.json"
RECIPE_FILE = Path(__file__).parents[1] / "docs" / "recipe.schema.json"
TITLE = "What qcompile prints with --json, by command; null: not known or not finite"
COMMANDS: dict[str, Any] = {
    "bench": list[Comparison],
    "calibrators": list[CalibratorRow],
    "compile": Report,
    "demo": Report,
    "diff": Difference,
    "export": ExportAccount,
    "folder": CompiledFolder,
    "inspect": Inspection,
    "passes": list[PassRow],
    "recipes": list[RecipeRow],
    "sensitivity": Ranking,
    "targets": list[TargetRow],
    "verify": Verdict,
}
Schema = dict[str, Any]
_SCALARS = {str: "string", Path: "string", bool: "boolean", int: "integer", float: "number"}
_NULL, _EMPTY = {"type": "null"}, {"type": "object", "maxProperties": 0}
_WIDTH = 110


class Schemas:
    """Definitions by class name; ``of`` adds those that a type hint refers to."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def of(self, hint: Any, *, known: bool = False) -> Schema:
        """The schema of a value, which is not None where it is ``known``.

        Raises TypeError for a type that JSON does not have.
        """
        origin, args = get_origin(hint), get_args(hint)
        if origin is Annotated:
            texts = [a for a in args[1:] if isinstance(a, str)]
            shown = [a for a in args if not isinstance(a, str)][-1]
            return self.of(shown, known=known) | ({"description": texts[0]} if texts else {})
        if origin in (Union, types.UnionType):
            return _any_of([self.of(a) for a in args if not (known and a is types.NoneType)])
        if origin is Literal:
            return {"enum": list(args)}
        if origin is tuple and args[-1] is not ...:
            whole = {"minItems": len(args), "maxItems": len(args)}
            return {"type": "array", "prefixItems": [self.of(a) for a in args], **whole}
        if origin in (list, tuple):
            return {"type": "array", "items": self.of(args[0])}
        if origin in (dict, Mapping):
            return {"type": "object", "additionalProperties": self.of(args[1])}
        if is_dataclass(hint) or hasattr(hint, "_fields"):
            return self._reference(hint)
        if hint is Any:
            return {}
        if hint is types.NoneType:
            return _NULL
        if hint not in _SCALARS:
            raise TypeError(f"{hint} has no place in JSON")
        return {"type": _SCALARS[hint]}

    def _reference(self, cls: Any) -> Schema:
        name = cls.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # it may refer to itself
            keys = list(self._keys(cls))
            self.definitions[name] = {
                "type": "object",
                **_described(cls),
                "properties": {member.key: schema for member, schema in keys},
                "required": [member.key for member, _ in keys if member.absent != "left out"],
            }
        return {"$ref": f"#/$defs/{name}"}

    def _keys(self, cls: Any) -> Iterator[tuple[Member, Schema]]:
        for member in members_of(cls):
            hint, about = _attribute(cls, member.attribute)
            if member.key == "**":
                yield from self._keys(hint)
                continue
            found = about | self.of(hint, known=member.absent != "null")
            if member.absent == "{}":
                found = {"anyOf": [{"$ref": found.pop("$ref")}, _EMPTY], **found}
            yield member, found


def _any_of(options: list[Schema]) -> Schema:
    """One of several; plain types as a list of them."""
    if len(options) == 1:
        return options[0]
    if any(list(o) != ["type"] for o in options):
        return {"anyOf": options}
    names = [o["type"] if isinstance(o["type"], list) else [o["type"]] for o in options]
    return {"type": list(dict.fromkeys(chain(*names)))}


def _attribute(cls: Any, path: str) -> tuple[Any, Schema]:
    """Type and description of a field or property, or of an attribute's attribute."""
    owner, _, rest = path.partition(".")
    found = getattr(cls, owner, None)
    if isinstance(found, property):
        hint, about = get_type_hints(found.fget, include_extras=True)["return"], _described(found)
    else:
        hint, about = get_type_hints(cls, include_extras=True)[owner], {}
    return _attribute(hint, rest) if rest else (hint, about)


def _described(documented: Any) -> Schema:
    """The first sentence of a docstring."""
    paragraph = " ".join((documented.__doc__ or "").partition("\n\n")[0].split())
    sentence = paragraph.partition(". ")[0].removesuffix(".").replace("``", "")
    return {"description": sentence} if sentence else {}


def schema() -> Schema:
    """The schema of each command's output, and the definitions that it refers to."""
    schemas = Schemas()
    commands = {name: schemas.of(hint) for name, hint in COMMANDS.items()}
    version = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": version, "title": TITLE, "$defs": {**commands, **schemas.definitions}}


def lines(value: Any, indent: int = 0, start: str = "", end: str = "") -> list[str]:
    """JSON in few lines: a value that fits one line stays on it, and lines are filled."""
    whole = f"{start}{json.dumps(value, ensure_ascii=False)}{end}"
    if not isinstance(value, dict | list) or indent + len(whole) <= _WIDTH:
        return [whole]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    items = value.items() if isinstance(value, dict) else (("", item) for item in value)
    output, fillable = [start + opening], True
    for number, (key, item) in enumerate(items, 1):
        name = f"{json.dumps(key)}: " if key else ""
        inner = lines(item, indent + 1, name, f"{closing}{end}" if number == len(value) else ",")
        room = _WIDTH - indent - len(output[-1]) - 1
        if len(inner) == 1 and len(inner[0]) <= room and fillable:
            output[-1] += f"{' ' * (number > 1)}{inner[0]}"
        else:
            output += [f" {line}" for line in inner]
        fillable = len(inner) == 1
    return output


def text() -> str:
    """The file's contents."""
    return "\n".join(lines(schema())) + "\n"


def main() -> None:
    """Write the files."""
    FILE.write_text(text())
    RECIPE_FILE.write_text("\n".join(lines(recipe_schema())) + "\n")


if __name__ == "__main__":
    main()
