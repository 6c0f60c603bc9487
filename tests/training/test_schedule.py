"""Rates rise and fall, and lengths are what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from qcompile.errors import TrainingError
from qcompile.training.loop.schedule import Schedule, rate_factor


def test_rates_rise_and_fall() -> None:
    share = Schedule(warmup=0.2).share_of_rate
    found = [share(done) for done in (0, 0.1, 0.2, 0.6, 1, 1.5)]
    assert found == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert Schedule(warmup=0).share_of_rate(0) == 1


def test_lengths() -> None:
    assert Schedule(epochs=1.5).total(10) == 15
    assert Schedule(epochs=0.01).total(10) == 1
    assert Schedule(epochs=9, steps=7).total(10) == 7
    assert Schedule(evaluations=4).evaluation_interval(10) == 2
    assert Schedule(evaluations=40).evaluation_interval(10) == 1
    assert Schedule(evaluations=0).evaluation_interval(10) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"epochs": float("nan")}, {"epochs": float("inf")}, {"steps": 0},
        {"seconds": -1}, {"clip": 0}, {"warmup": 1}, {"warmup": -0.1}, {"weight_rate": -1},
        {"range_rate": float("nan")}, {"evaluations": -1}, {"seed": -1},
    ],
)  # fmt: skip
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="expected"):
        Schedule(**wrong)


def test_steps_of_fewer_bits_are_larger() -> None:
    assert [rate_factor(bits) for bits in (16, 8, 5, 4, 3, 2)] == [1, 1, 1, 1, 2, 4]


def test_without_labels_weights_of_many_bits_move_less() -> None:
    found = [rate_factor(bits, distilled=True) for bits in (8, 6, 4, 3, 2)]
    assert found == [0.25, 0.5, 1, 2, 4]
