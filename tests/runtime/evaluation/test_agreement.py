"""Two programs agree where their outputs differ by rounding alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.quant import Array
from qcompile.runtime.evaluation.agreement import Agreement, Run, agree

LIMIT = 1e-3
EXPECTED = np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]], np.float32)
FEED = {"ids": np.zeros((3, 2), np.int64)}


def runs(found: Array, expected: Array = EXPECTED, feed: dict[str, Array] = FEED) -> list[Run]:
    return [({"y": expected}, {"y": found}, feed)]


def test_equal_outputs() -> None:
    assert agree(runs(EXPECTED), LIMIT) == Agreement(3, 3, 3, 0.0, 0.0, LIMIT)


def test_differences_are_relative_to_the_size_of_the_outputs() -> None:
    off = EXPECTED.copy()
    off[0, 0] += 0.25
    found, larger = agree(runs(off), LIMIT), agree(runs(8 * off, 8 * EXPECTED), LIMIT)
    size = np.sqrt(np.mean(np.square(EXPECTED)))
    assert found.largest == pytest.approx(0.25 / size)
    assert found.rms == pytest.approx(0.25 / np.sqrt(6) / size)
    assert found == larger and not found.holds and found.argmax_equal == 3


def test_decisions_are_counted() -> None:
    found = agree(runs(EXPECTED[:, ::-1]), LIMIT)
    assert (found.argmax_equal, found.decisions) == (1, 3)  # that of equal numbers stays
    assert found.lead_change == pytest.approx(2 * found.margin)  # each lead is the other's now
    single = agree(runs(EXPECTED[:, :1], EXPECTED[:, :1]), LIMIT)
    assert single.decisions == 0 and single.holds


def test_another_decision_holds_within_its_limit_alone() -> None:
    off = EXPECTED.copy()
    off[0] = 2.0, 1.9  # expected: 1.0, 2.0
    size = np.sqrt(np.mean(np.square(EXPECTED)))
    found = replace(agree(runs(off), LIMIT), limit=1.0)
    assert found.argmax_equal == 2 and found.margin == pytest.approx(1.0 / size)
    assert found.lead_change == pytest.approx((1.0 + 0.1) / size)
    assert found.holds and "in others" not in str(found)
    assert replace(found, margin_limit=0.7).holds
    closer = replace(found, margin_limit=0.6)
    assert not closer.holds and "in others by 6.3e-01 (limit 6.0e-01)" in str(closer)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_holds(value: float) -> None:
    off = EXPECTED.copy()
    off[1, 1] = value
    with np.errstate(invalid="ignore"):
        assert not agree(runs(off), LIMIT).holds


def test_another_shape_never_holds() -> None:
    assert not agree(runs(EXPECTED[:2]), LIMIT).holds


def test_padding_does_not_count() -> None:
    states = np.ones((2, 3, 4), np.float32)
    off = states.copy()
    off[1, 2] = 9
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    feed = {"ids": mask, "attention_mask": mask}
    assert agree(runs(off, states, feed), LIMIT).rms == 0
    assert agree(runs(off, states, {"ids": mask}), LIMIT).rms > 0
    assert agree(runs(off, states, feed), LIMIT).decisions == 5


def test_integers_are_not_compared() -> None:
    chosen = np.zeros((3, 1), np.int64)
    pairs: list[Run] = [({"y": EXPECTED, "i": chosen}, {"y": EXPECTED, "i": chosen + 1}, FEED)]
    assert agree(pairs, LIMIT).holds
