"""The keys of a recipe for people and editors: what each means, and a JSON Schema of the file.

The schema holds no rules of its own: names and limits are those of the code that reads recipes, and
a test tries documents on both.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from functools import cache
from typing import Any, TypeAlias

from qcompile.compiler.config.recipe import GATES, MAPPINGS, POOLINGS, Recipe
from qcompile.planning.context import ATTENTIONS, MODES, PRECISIONS, WEIGHT_BITS
from qcompile.rewriting.registry import calibrators, targets
from qcompile.targets import instruction_sets

Schema: TypeAlias = dict[str, Any]
# A key of the docstring of Recipe, and its description, which may take several lines.
_KEY = re.compile(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", re.MULTILINE)
_TEXT: Schema = {"type": "string"}
_NAMES: Schema = {"type": "array", "items": {"type": ["string", "integer"]}}
_BLOCKS = [0, *(1 << n for n in range(4, 31))]


@cache
def descriptions() -> dict[str, str]:
    """What each key means, on one line, from the documentation of ``Recipe``, in words of YAML."""
    text = inspect.cleandoc(Recipe.__doc__ or "").replace("``", "`").replace("None", "null")
    return {key: " ".join(words.split()) for key, words in _KEY.findall(text)}


def defaults() -> dict[str, Any]:
    """The value of each key that a recipe does not set, as in a file."""
    default = Recipe()
    values = {f.name: getattr(default, f.name) for f in fields(Recipe)}
    shown = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {**shown, **{name: {} for name in MAPPINGS}}


def commented_keys(left_out: set[str]) -> str:
    """The other keys as comments of YAML, with default and meaning, one a line."""
    meant = descriptions()
    lines = (
        f"# {key}: {json.dumps(value)}  # {meant[key]}"
        for key, value in defaults().items()
        if key not in left_out
    )
    return "\n".join(lines) + "\n"


def recipe_schema() -> Schema:
    """A JSON Schema (2020-12) of recipe files. Keys may be written with - in place of _.

    Names of targets and calibrators are offered, but others are allowed: plug-ins may add some.
    """
    meant, default = descriptions(), defaults()
    keys = {
        name: {"description": meant[name], "default": default[name], **_optional(value)}
        for name, value in _values().items()
    }
    hyphened = {name.replace("_", "-"): value for name, value in keys.items()}
    embeds = {"enum": list(POOLINGS)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qcompile recipe",
        "description": "What `qcompile compile --recipe FILE.yaml` builds",
        "type": "object",
        "properties": {**keys, **hyphened},
        "additionalProperties": False,
        "if": {"properties": {"normalize": {"const": True}}, "required": ["normalize"]},
        "then": {"properties": {"pooling": embeds}, "required": ["pooling"]},
    }


def _values() -> dict[str, Schema]:
    """What the value of each key may be, apart from null."""
    limits = {"type": ["number", "null"]}
    gates = {name: limits for gate in GATES for name in (gate, gate.replace("_", "-"))}
    isas = (*instruction_sets.TABLE, instruction_sets.ANY, instruction_sets.NATIVE, "")
    return {
        "target": _offered(targets()),
        "mode": {"enum": list(MODES)},
        "calibrator": _offered(calibrators()),
        "pipeline": _TEXT,
        "transforms": _TEXT,
        "keep_float": _NAMES,
        "mask_padding": {"type": "boolean"},
        "keep_padding_rows": {"type": "boolean"},
        "float16": {"type": "boolean"},
        "seed": {"type": "integer", "minimum": 0},
        "precision": _mapping({"enum": list(PRECISIONS)}),
        "attention": {"enum": [*ATTENTIONS, ""]},
        "general_text": {"type": "boolean"},
        "isa": {"enum": list(isas)},
        "dims": _mapping({"type": "integer", "minimum": 1}),
        "pooling": {"enum": [*POOLINGS, ""]},
        "normalize": {"type": "boolean"},
        "forms": _mapping(_TEXT),
        "outputs": _NAMES,
        "weight_bits": {"enum": list(WEIGHT_BITS)},
        "embedding_bits": {"enum": list(WEIGHT_BITS)},
        "weight_block": {"enum": _BLOCKS},
        "gates": {"type": "object", "properties": gates, "additionalProperties": False},
    }


def _offered(names: Any) -> Schema:
    return {"anyOf": [{"enum": list(names)}, _TEXT]}


def _mapping(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _optional(value: Schema) -> Schema:
    """The same, or null, which leaves the key as it is."""
    if "enum" in value:
        return {"enum": [*value["enum"], None]}
    if "anyOf" in value:
        return {"anyOf": [*value["anyOf"], {"type": "null"}]}
    return {**value, "type": [value["type"], "null"]}
