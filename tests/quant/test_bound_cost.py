"""The cost of a bound, predicted from scales, against the noise of two real roundings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.quant import QSpec, Range, qparams, real
from qcompile.quant.bound_cost import activation_cost_db, weight_cost_db
from qcompile.quant.rounding import nearest
from qcompile.rewriting.testing import normal

PLAIN = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True)


def noise_db(values: np.ndarray, spec: QSpec) -> float:
    error = real(nearest(values, spec)).astype(np.float64) - values
    return 10 * float(np.log10(np.square(error).sum()))


@pytest.mark.parametrize("spec", [replace(PLAIN, paired=True), replace(PLAIN, reduced=True)])
@pytest.mark.parametrize("shape", [(256, 64), (2048, 16)])
def test_it_is_the_ratio_of_the_noises(shape: tuple[int, int], spec: QSpec) -> None:
    values = normal(*shape)
    found = weight_cost_db(values, nearest(values, spec).params)
    assert found == pytest.approx(noise_db(values, spec) - noise_db(values, PLAIN), abs=0.15)
    assert found is not None and 0 < found < 6.1


def test_seven_bits_cost_six_decibels() -> None:
    """20 log10(127 / 64)."""
    spec = QSpec("int8", symmetric=True, narrow=True, reduced=True)
    span = Range(np.array(-2.0), np.array(3.0))
    assert activation_cost_db(span, qparams(span, spec)) == pytest.approx(5.953, abs=0.001)


def test_no_bound_has_no_cost() -> None:
    values = normal(8, 3)
    assert weight_cost_db(values, nearest(values, PLAIN).params) is None
    span = Range(np.array(-2.0), np.array(3.0))
    uint8 = QSpec("uint8", symmetric=False)
    assert activation_cost_db(span, qparams(span, uint8)) is None


def test_pairs_that_fit_cost_nothing() -> None:
    """Neighbours of opposite signs need no larger scale."""
    values = np.tile(np.array([[1.0], [-1.0]], np.float32), (8, 3))
    assert weight_cost_db(values, nearest(values, replace(PLAIN, paired=True)).params) == 0
