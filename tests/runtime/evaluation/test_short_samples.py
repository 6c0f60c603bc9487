"""Samples of few values are compared together, with the figures of one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.quant import Array
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.evaluation.closeness import Closeness, cosine


def made(shape: tuple[int, ...], seed: int, bad: float | None) -> tuple[Array, Array]:
    """Reference and candidate: some samples equal, some zero, and one not finite."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    y = x + rng.standard_normal(shape).astype(np.float32) * np.float32(0.1)
    y[::3], x[::7] = x[::3], 0
    if bad is not None:
        y[4] = bad
    return x, y


def one_by_one(x: Array, y: Array) -> tuple[list[float], float, float, float, int]:
    """Cosines, signal, noise, largest difference and flips by their definitions."""
    cosines, signal, noise, largest, flips = [], 0.0, 0.0, 0.0, 0
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        cosines.append(cosine(a, b))
        signal += float(np.square(a[np.isfinite(a)]).sum())
        if not np.array_equal(a, b, equal_nan=True):
            finite = np.isfinite(a).all() and np.isfinite(b).all()
            difference = np.abs(a - b) if finite else np.array(np.inf)
            noise += float(np.square(difference).sum())
            largest = max(largest, float(difference.max()))
        flips += int(a.ndim == 1 and a.size > 1 and a.argmax() != b.argmax())
    return cosines, signal, noise, largest, flips


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 2), (50, 4, 4), (50, 17)])
@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_figures_are_those_of_one_sample_after_the_other(
    shape: tuple[int, ...], bad: float | None
) -> None:
    x, y = made(shape, seed=len(shape), bad=bad)
    found = Closeness("y")
    found.update(x, y, None)
    cosines, *sums = one_by_one(x, y)
    if x.size == len(x):  # one product a sample: no order of additions
        assert found.cosine == cosines
        np.testing.assert_array_equal(found.single, np.stack([x.flatten(), y.flatten()], axis=1))
    # 16 products may be added in another order: each of their sums rounds once, 16 * 2^-53.
    np.testing.assert_allclose(found.cosine, cosines, rtol=0, atol=4e-15)
    assert [found.signal, found.noise, found.max_abs, found.flips] == sums


@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_parts_do_not_change_figures(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = made(shape, seed=1, bad=None)
    whole, parts = Closeness("y"), Closeness("y")
    whole.update(x, y, None)
    monkeypatch.setattr(closeness, "_PART", 7)
    parts.update(x, y, None)
    for found in (whole, parts):
        found.close()
    assert whole.cosine == parts.cosine
    assert (whole.signal, whole.noise, whole.flips) == (parts.signal, parts.noise, parts.flips)


def test_many_single_numbers_are_not_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million of them took two minutes."""

    def slow(*_: object) -> None:
        raise AssertionError("compared one by one")

    monkeypatch.setattr(Closeness, "_sample", slow)
    found = Closeness("y")
    x = np.arange(20_000, dtype=np.float32)
    found.update(x, x, None)
    assert len(found.cosine) == len(found.single) == x.size
    with pytest.raises(AssertionError, match="one by one"):  # the check itself works
        found.update(np.ones((2, 17)), np.ones((2, 17)), None)
