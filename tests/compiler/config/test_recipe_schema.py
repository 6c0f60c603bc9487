"""The schema of recipes accepts what the code that reads recipes accepts, and nothing else."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.config import recipe_schema
from qcompile.compiler.config.recipe import GATES, Recipe, merge_settings
from qcompile.errors import RecipeError
from tools import json_schema

KEYS = tuple(f.name for f in fields(Recipe))
WORDS = (
    "cpu", "static", "float", "scores", "mean", "auto", "avx2", "native", "any", "min_cosine",
    "max-flips", "x", "", "off",
)  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((-1, 0, 1, 2, 7, 8, 9, 16, 17, 24, 32, 48, 1 << 20)),
    st.sampled_from((0.5, -1.5, 99.9)),
    st.sampled_from(WORDS),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=2),
    st.dictionaries(st.sampled_from(WORDS), scalars, max_size=2),
)
keys = st.sampled_from((*KEYS, *(k.replace("_", "-") for k in KEYS), "unknown"))


def reads(document: dict[str, Any]) -> bool:
    """Whether the code takes the document."""
    try:
        merge_settings(Recipe(), document, "test")
    except RecipeError:
        return False
    return True


def is_valid(document: dict[str, Any]) -> bool:
    """Whether the schema takes it."""
    validator = jsonschema.Draft202012Validator(recipe_schema.recipe_schema())
    return bool(validator.is_valid(document))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(keys, values)
def test_both_say_the_same_of_any_value(key: str, value: Any) -> None:
    assert is_valid({key: value}) == reads({key: value}), {key: value}


@pytest.mark.parametrize(
    "document",
    [
        {"pooling": "mean", "normalize": True},
        {"normalize": True},
        {"pooling": "", "normalize": True},
        {"pooling": None, "normalize": True},
        {"gates": {"min_cosine": 0.99, "max-abs": None}},
        {"gates": {"min_cosin": 0.99}},
        {"gates": {"min_cosine": True}},
        {"precision": {"a": 16, "b": "float"}},
        {"keep_float": [["a"]]},
        {},
    ],
)
def test_both_say_the_same_of_documents(document: dict[str, Any]) -> None:
    assert is_valid(document) == reads(document)


def test_every_key_is_described_and_has_its_default() -> None:
    schema = recipe_schema.recipe_schema()
    assert set(recipe_schema.descriptions()) == set(KEYS)
    assert {k.replace("-", "_") for k in schema["properties"]} == set(KEYS)
    defaults = {k: schema["properties"][k]["default"] for k in KEYS}
    assert merge_settings(Recipe(target="qdq"), defaults, "test") == Recipe()
    assert set(GATES) <= set(schema["properties"]["gates"]["properties"])


def test_the_published_file_is_this_schema() -> None:
    assert json.loads(json_schema.RECIPE_FILE.read_text()) == recipe_schema.recipe_schema()
