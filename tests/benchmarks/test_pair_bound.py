"""The cost of bounded weights, in a model where neighbours are equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import pair_bound
from qcompile.rewriting.testing import model_proto


def test_an_order_separates_equal_neighbours(tmp_path: Path) -> None:
    """Pairs of two large weights double the step; with a small one next to each, nothing does."""
    weight = np.tile([[1.0], [1.0], [0.001], [0.001]], (8, 3)).astype(np.float32)
    path = tmp_path / "m.onnx"
    text = "g (float[n,32] x) => (float[n,3] y) { y = MatMul(x, w) }"
    path.write_bytes(model_proto(text, w=weight).SerializeToString())
    count, bounded, seven, best = pair_bound.row(path)
    assert count == 1
    assert bounded == pytest.approx((2 * 127 / 127.5) ** 2)
    assert seven == pytest.approx((127 / 64) ** 2)
    assert best == pytest.approx((1.001 * 127 / 127.5) ** 2, abs=0.01)
    assert sorted(map(tuple, pair_bound.reordered(weight))) == sorted(map(tuple, weight))
