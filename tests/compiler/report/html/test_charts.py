"""Places on axes, and their ticks."""

from __future__ import annotations

import pytest

from qcompile.compiler.report.html.charts import Scale, bar, stacked


def test_a_linear_scale_is_percent_and_ends_at_its_ends() -> None:
    scale = Scale(0, 8)
    assert [scale(v) for v in (-1, 0, 2, 8, 9)] == [0, 0, 25, 100, 100]


def test_a_logarithmic_scale_gives_decades_the_same_length() -> None:
    scale = Scale(1e-4, 1, logarithmic=True)
    assert [scale(v) for v in (0, 1e-4, 1e-2, 1)] == [0, 0, 50, 100]
    assert scale.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 16.5, [0, 5, 10, 15]),
        (0.9, 2.6, [1, 1.5, 2, 2.5]),
        (0, 0.007, [0, 0.002, 0.004, 0.006]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert Scale(low, high).ticks() == pytest.approx(ticks)


def test_a_scale_without_extent_does_not_divide_by_zero() -> None:
    assert Scale(3, 3)(3) == 0 and Scale(1, 1, logarithmic=True)(1) == 0


def test_what_is_there_is_seen_and_what_is_not_is_not() -> None:
    assert 'width="0.3%"' in bar(1e-9, "float", "little")
    assert 'width="0%"' in bar(0, "float", "nothing")


def test_parts_of_a_stack_follow_each_other() -> None:
    made = stacked([(1, "a", "one"), (3, "b", "three")], 8, "both")
    assert 'x="0%" width="12.5%"' in made and 'x="12.5%" width="37.5%"' in made
