"""Rounding methods on a layer with correlated inputs."""

from __future__ import annotations

import numpy as np

from benchmarks.rounding_error import Layer, compared
from qcompile.rewriting.testing import normal


def test_each_method_is_compared_with_nearest() -> None:
    x = normal(400, 8) @ normal(8, 32, seed=1) + np.float32(0.1) * normal(400, 32, seed=2)
    seen, held_out = x[::2], x[1::2]
    layer = Layer("a", normal(32, 12, seed=3), seen.T @ seen, held_out.T @ held_out)
    found = compared(layer, 3, 16)
    assert [*found][::4] == ["GPTQ", "GPTQ, AdaRound, descent"]
    assert all(seen < 0.8 and held_out < 0.9 for seen, held_out, _ in found.values())
    assert found["GPTQ, AdaRound, descent"][0] < found["GPTQ"][0]


def test_a_layer_without_data_has_no_figures() -> None:
    nothing = np.zeros((8, 8), np.float32)
    assert compared(Layer("a", normal(8, 4), nothing, nothing), 4, None) == {}
