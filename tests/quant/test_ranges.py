"""Ranges from few values leave room for more of them."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.quant import ENOUGH_VALUES, Range, widened


@pytest.mark.parametrize(
    ("span", "values", "expected"),
    [
        ((-1.0, 3.0), 32, (-3.0, 5.0)),  # log 1024 / log 32 = 2: twice the width
        ((0.0, 4.0), 32, (0.0, 6.0)),
        ((1.0, 4.0), 32, (0.0, 5.5)),
        ((-4.0, 0.0), 32, (-6.0, 0.0)),
        ((-4.0, -3.0), 32, (-4.5, -2.5)),
        ((2.0, 2.0), 1, (2.0, 2.0)),
        ((-1.0, 3.0), ENOUGH_VALUES, (-1.0, 3.0)),
        ((-1.0, 3.0), 1 << 20, (-1.0, 3.0)),
    ],
)
def test_widened(span: tuple[float, float], values: int, expected: tuple[float, float]) -> None:
    found = widened(Range(np.array(span[0]), np.array(span[1])), values)
    assert (float(found.lo), float(found.hi)) == pytest.approx(expected, abs=1e-12)


def test_each_channel_by_its_own_width() -> None:
    found = widened(Range(np.array([-1.0, 0.0]), np.array([1.0, 4.0]), axis=1), 32)
    assert found.axis == 1
    np.testing.assert_allclose(found.lo, [-2, 0])
    np.testing.assert_allclose(found.hi, [2, 6])


@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential"])
def test_fewer_values_are_clipped(draw: str) -> None:
    """Of 1024 further values, by 16 that were seen: on average over many draws."""
    rng = np.random.default_rng(0)
    outside = np.zeros(2)
    for _ in range(200):
        seen, later = getattr(rng, draw)(16), getattr(rng, draw)(ENOUGH_VALUES)
        span = Range(seen.min(), seen.max())
        for i, found in enumerate((span, widened(span, seen.size))):
            outside[i] += np.mean((later < min(found.lo, 0)) | (later > max(found.hi, 0)))
    assert outside[1] < outside[0] / 4
