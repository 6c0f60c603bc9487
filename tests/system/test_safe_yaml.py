from __future__ import annotations

import pytest

from qcompile.system.safe_yaml import load_yaml


def test_values_are_plain() -> None:
    assert load_yaml("a: [1, 2.5, yes]\nb: {c: null}") == {"a": [1, 2.5, True], "b": {"c": None}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x", "alias in line 2"),
        ("[" * 10_000, "nested too deeply"),
        ("a: 2001-99-99", "month must be in"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("{[a]: b}: c", "while constructing a mapping"),
        ("a: 'b", "while scanning a quoted scalar"),
    ],
)
def test_anything_else_is_a_value_error(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_yaml(text)
