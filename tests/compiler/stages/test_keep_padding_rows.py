"""Padded positions are skipped, and a note says so; with keep_padding_rows they are as in float."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import qcompile
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.stages.options import CompileOptions
from qcompile.compiler.stages.result import Result
from qcompile.data.feeds import Feed
from qcompile.errors import RecipeError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import encoder
from qcompile.runtime.evaluation.closeness import Gates, judge
from qcompile.runtime.session import Session

MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
QUIET = CompileOptions(bench=False, force=True)


def feeds() -> list[Feed]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 64, MASK.shape) for _ in range(4)]
    return [{"ids": i, "attention_mask": MASK.astype(np.int64)} for i in ids]


def compiled(recipe: Recipe, data: Sequence[Feed] | None = None) -> Result:
    return qcompile.compile(serialize(encoder()), data, recipe=recipe, options=QUIET)


def codes(result: Result) -> set[str]:
    return {note.code for note in result.report.notes}


@pytest.mark.parametrize("keep", [False, True])
def test_float_rows_are_kept_on_request(keep: bool) -> None:
    result, feed = compiled(Recipe(mode="float", keep_padding_rows=keep)), feeds()[0]
    old, new = (Session(m).run(feed)["out"] for m in (serialize(encoder()), result.model))
    np.testing.assert_allclose(new[MASK != 0], old[MASK != 0], atol=1e-5)
    assert np.allclose(new[MASK == 0], old[MASK == 0], atol=1e-5) == keep
    assert ("padding-skipped" in codes(result)) != keep


def test_integers_are_calibrated_and_compared_on_them() -> None:
    kept = compiled(Recipe(keep_padding_rows=True), feeds())
    skipped = compiled(Recipe(), feeds())
    assert kept.report.calibration is not None and skipped.report.calibration is not None
    assert not kept.report.calibration.padding_left_out
    assert skipped.report.calibration.padding_left_out


def test_other_padded_rows_fail_the_gate_where_they_are_kept() -> None:
    feed = feeds()[0]
    old = np.random.default_rng(1).normal(size=(*MASK.shape, 8)).astype(np.float32)
    new = np.where(MASK[..., None] != 0, old, -old)
    pairs = [({"y": old}, {"y": new}, feed)]
    assert judge(pairs, Gates()).passed
    assert not judge(pairs, Gates(), padding=True).passed


def test_a_pipeline_that_removes_them_contradicts() -> None:
    with pytest.raises(RecipeError, match="runs 'remove-padding', but keep_padding_rows"):
        compiled(Recipe(pipeline="remove-padding", keep_padding_rows=True))
