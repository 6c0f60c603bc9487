"""Pipeline strings: read back what is written, refuse what makes no sense, in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.stages.pipelines import default_pipeline
from qcompile.errors import RecipeError
from qcompile.rewriting import Pass, Stage
from qcompile.rewriting.pipeline_spec import check_order, parse, parse_items, spell
from qcompile.rewriting.registry import passes, targets

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(0, 1 << 40),
    "float": st.floats(0.1, 1e6),
    "bool": st.booleans(),
    "str": st.sampled_from(["", "x", "layer*"]),
}


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Pass, ...]:
    """Registered passes in the order of their stages, with any options."""
    chosen = draw(st.lists(st.sampled_from(list(passes().values())), min_size=1, unique=True))
    found = []
    for cls in sorted(chosen, key=lambda c: (c.stage, c.name)):
        options = {
            f.name: draw(VALUES[str(f.type)])
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if draw(st.booleans())
        }
        try:
            found.append(cls(**options))
        except ValueError:  # a value that the pass refuses
            found.append(cls())
    return tuple(found)


@given(pipelines())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_parse_reads_back_what_spell_writes(found: tuple[Pass, ...]) -> None:
    try:
        check_order(found)
    except RecipeError:
        return
    assert parse(spell(found)) == found


@pytest.mark.parametrize("target", targets().values(), ids=targets())
def test_the_default_pipelines_are_sound(target: Any) -> None:
    for mode in target.modes:
        text = default_pipeline(target, mode)
        assert spell(parse(text)) == text.replace(" ", "")


def test_spaces_dashes_and_defaults() -> None:
    assert spell(parse(" fold-constants { max-growth = 2 } , raise-opset{to=0}")) == (
        "fold-constants{max-growth=2},raise-opset"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", {})]),
        ("a{}", [("a", {})]),
        ("a{x=1,y-z=2.5}", [("a", {"x": 1, "y_z": 2.5})]),
        ("a{x=true},b{y=word}", [("a", {"x": True}), ("b", {"y": "word"})]),
        ("a{x=1e-3,y=-2.5E+4}", [("a", {"x": 0.001, "y": -25000.0})]),
    ],
)
def test_items(text: str, expected: list[tuple[str, dict[str, Any]]]) -> None:
    assert parse_items(text, "pipeline") == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the pipeline is empty"),
        ("fold-constants fuse-gelu", "cannot be read from 'fold-constants fuse-gelu' on"),
        ("fold-constants,,fuse-gelu", "cannot be read from ',fuse-gelu' on"),
        ("fold-constants{max-growth=2", "cannot be read from"),
        ("fold-constants{max-growth}", "option 'max-growth' has no value, expected name=value"),
        ("fold-constants{max-growth=[}", r"option value '\[' cannot be read"),
        ("fold-constants{max-growth=x}", "is 'x', expected float"),
        ("fold-constants{max_grwoth=2}", "no option 'max_grwoth', did you mean 'max_growth'"),
        ("fold-constant", "unknown pass 'fold-constant', did you mean 'fold-constants'"),
        (
            "insert-qdq,fold-constants",
            r"'fold-constants' \(simplify\) cannot follow 'insert-qdq' \(insert\)",
        ),
    ],
)
def test_what_makes_no_sense(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse(text)


def test_after_is_held() -> None:
    first, second = parse("fold-constants,raise-opset")

    class Later(type(second)):  # type: ignore[misc]
        name = "later"
        stage = Stage.SIMPLIFY
        after = ("fold-constants",)

    check_order([first, Later()])
    check_order([Later()])
    with pytest.raises(RecipeError, match="'later' must come after 'fold-constants'"):
        check_order([Later(), first])
