"""A corrected weight makes up for errors of earlier layers as far as they are linear."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.quant import Array
from qcompile.quant.error_feedback import mean_error, retargeted
from qcompile.rewriting.testing import normal


def data(rows: int = 300) -> tuple[Array, Array]:
    """Inputs of the float model, and those of the quantized one: linearly distorted."""
    x = normal(rows, 12)
    distortion = np.eye(12, dtype=np.float32) + np.float32(0.1) * normal(12, 12, seed=1)
    return x, x @ distortion


def test_a_linear_error_is_made_up_for() -> None:
    x, seen = data()
    w = normal(12, 5, seed=2)
    missing = (x - seen) @ w
    found = retargeted(w, seen.T @ seen, seen.T @ missing, 1e-6)
    assert np.abs(seen @ found - x @ w).max() < 1e-3
    assert np.abs(seen @ w - x @ w).max() > 0.1


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
def test_damping_keeps_the_weight(damping: float) -> None:
    """More of it gives smaller changes, and never a larger error on the data."""
    x, seen = data()
    w = normal(12, 5, seed=2)
    missing = (x - seen) @ w
    gram, cross = seen.T @ seen, seen.T @ missing
    found, freer = retargeted(w, gram, cross, damping), retargeted(w, gram, cross, damping / 10)
    assert np.linalg.norm(found - w) < np.linalg.norm(freer - w)
    assert np.linalg.norm(seen @ found - x @ w) < np.linalg.norm(missing)


def test_nothing_missing_changes_nothing() -> None:
    w, gram = normal(12, 5), np.eye(12, dtype=np.float32)
    assert np.array_equal(retargeted(w, gram, np.zeros((12, 5)), 0.1), w)
    assert np.array_equal(retargeted(w, 0 * gram, np.ones((12, 5)), 0.1), w)


def test_the_mean_error_is_what_the_outputs_lack() -> None:
    x, seen = data()
    w, bias = normal(12, 5, seed=2), np.float32(0.5)
    rounded = np.round(w)
    missing = (x + bias - seen) @ w
    shift = mean_error(w, rounded, seen.mean(0), missing.mean(0))
    assert np.allclose((seen @ rounded + shift).mean(0), ((x + bias) @ w).mean(0), atol=1e-4)
    alone = mean_error(w, rounded, seen.mean(0))
    assert np.allclose((seen @ rounded + alone).mean(0), (seen @ w).mean(0), atol=1e-4)
