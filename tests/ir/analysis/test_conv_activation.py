"""What the passes on convolutions agree on."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.analysis.conv_activation import (
    bounds,
    channels_first,
    quantized_result,
    result,
    saturates,
)
from qcompile.rewriting.testing import normal, parse

F32 = np.float32


def activated(body: str, zero: int = 0) -> Graph:
    return parse(
        f"g (float[1,3,8,8] x) => (float[B,C,H,W] y) {{ {body} }}",
        w=normal(4, 3, 3, 3),
        low=np.array(-1, F32),
        high=np.array(6, F32),
        s=np.array(0.05, F32),
        z=np.array(zero, np.uint8),
    )


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("Relu(c)", (0, np.inf)),
        ("Clip(c, low, high)", (-1, 6)),
        ("Clip(c, , high)", (-np.inf, 6)),
        ("Clip(c, high, )", None),
        ("Clip(c, n, )", None),
        ("Sigmoid(c)", None),
    ],
)
def test_bounds(operator: str, expected: tuple[float, float] | None) -> None:
    """None where 0 would be cut off, and where a bound is computed."""
    graph = activated(f"n = Neg(low) c = Conv(x, w) r = {operator} y = Identity(r)")
    assert bounds(graph.producer(graph.tensors()["r"])) == expected


def test_the_result_of_a_convolution_is_behind_its_activation() -> None:
    graph = activated("c = Conv(x, w) r = Relu(c) y = Identity(r)")
    assert result(graph, graph.tensors()["c"]).name == "r"
    graph = activated("c = Conv(x, w) r = Relu(c) y = Add(r, c)")
    assert result(graph, graph.tensors()["c"]).name == "c"


@pytest.mark.parametrize(
    ("operator", "zero", "expected"),
    [
        ("Relu(c)", 0, True),
        ("Relu(c)", 1, False),
        ("Clip(c, low, )", 20, True),
        ("Clip(c, low, )", 21, False),
        ("Clip(c, , high)", 135, True),
        ("Clip(c, , high)", 134, False),
    ],
)
def test_a_cut_is_done_by_saturation(operator: str, zero: int, expected: bool) -> None:
    """With steps of 0.05 the integers end at -0.05 zero and at 0.05 (255 - zero)."""
    graph = activated(
        f"c = Conv(x, w) r = {operator} q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)",
        zero,
    )
    cut, quantizer = graph.nodes[1:3]
    assert saturates(cut, quantizer) is expected
    assert (quantized_result(graph, graph.nodes[0]) is quantizer) is expected


def test_axes_are_followed_from_a_convolution_both_ways() -> None:
    graph = activated(
        """a = Celu(x) c = Conv(a, w) r = Max(c, c) t = Transpose<perm = [0, 2, 3, 1]>(r)
        y = Relu(t)"""
    )
    assert channels_first(graph) == {"x", "a", "c", "r"}
