"""Choices of lowering options go together: what one puts in place, a later one may replace."""

from __future__ import annotations

import pytest

from qcompile.compiler.config.lowering_options import chosen_options, lowering_passes
from qcompile.compiler.config.recipe import Recipe
from qcompile.rewriting.registry import target
from qcompile.targets.target import Mode

PACKED = "lower-embeddings{form=packed}"


def passes(mode: Mode, **forms: str) -> list[str]:
    cpu = target("cpu")
    recipe = Recipe(forms=tuple(forms.items()))
    return lowering_passes(cpu, mode, chosen_options(cpu, mode, recipe))


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only"])
def test_two_choices_for_one_pass(mode: Mode) -> None:
    found = passes(mode, table="packed", attention="fused")
    assert found[found.index(PACKED) - 1] == "fuse-attention"
    assert "lower-embeddings" not in found


def test_float_data_of_weight_only() -> None:
    forms = {"weight-only-data": "float", "table": "packed"}
    found = passes("weight-only", **forms)
    assert found[:2] == ["lower-weight-only{accuracy=0}", PACKED]


def test_no_choice_is_the_targets_own_way() -> None:
    assert passes("static") == list(target("cpu").lower["static"])


def test_a_choice_may_leave_a_pass_out() -> None:
    assert "remove-padding" not in passes("static", padding="kept")
