"""What a tensor joins, and what is looked through on the way."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.planning.joins import Branch, branches
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import evaluate

INPUTS = "float[B,2,6] a, float[B,4,6] b, float[B,2,6] d, bool[B,2,6] m"


def joined(text: str, name: str = "t") -> list[tuple[str, ...]]:
    """Names of each branch of a tensor and of the functions after the join."""
    graph = parse(
        f"g ({INPUTS}) => (float y) {{ {text} y = Sigmoid(t) }}",
        shape=np.array([0, -1]),
        split=np.array([2, 4]),
        zero=np.array([0]),
        two=np.array([2]),
        one=np.array([1]),
        half=np.array(0.5, np.float32),
        token=normal(1, 2, 6),
        at=np.array([[0]]),
    )
    return [
        (b.tensor.name, *(n.op for n in b.functions))
        for b in branches(graph, graph.tensors()[name])
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t = Concat<axis = 1>(a, b)", [("a",), ("b",)]),
        ("c = Concat<axis = 1>(a, b) r = Reshape(c, shape) t = Identity(r)", [("a",), ("b",)]),
        ("c = Concat<axis = 1>(a, a) t = Concat<axis = 1>(c, b)", [("a",), ("b",)]),
        ("n = Neg(a) t = Concat<axis = 1>(n, b)", [("n",), ("b",)]),
        ("t = Concat<axis = 1>(token, a)", [("token",), ("a",)]),
        ("t = Where(m, a, d)", [("a",), ("d",)]),
        ("t = Where(m, a, half)", [("a",)]),
        ("t = Max(a, d)", [("a",), ("d",)]),
        ("t = ScatterND(a, at, token)", [("a",), ("token",)]),
        (
            "c = Concat<axis = 1>(a, b) s = Mul(c, half) t = Tanh(s)",
            [("a", "Mul", "Tanh"), ("b", "Mul", "Tanh")],
        ),
        ("n = Neg(a) t = Add(n, d)", []),
        ("n = Neg(a) t = Transpose<perm = [0, 2, 1]>(n)", []),
        # a part of the joined axis is of no branch for certain, one of another axis is
        ("c = Concat<axis = 1>(a, b) t, u = Split<axis = 1>(c, split)", []),
        (
            "c = Concat<axis = 1>(a, b) r = Transpose<perm = [0, 2, 1]>(c) "
            "t = Slice(r, zero, two, two)",
            [],
        ),
        ("c = Concat<axis = 1>(a, b) t = Slice(c, zero, two, two)", [("a",), ("b",)]),
        (
            "c = Concat<axis = 1>(a, b) r = Transpose<perm = [0, 2, 1]>(c) "
            "t = Slice(r, zero, two, one)",
            [("a",), ("b",)],
        ),
    ],
)
def test_branches(text: str, expected: list[tuple[str, ...]]) -> None:
    assert joined(text) == expected


def test_ranges_go_through_functions() -> None:
    graph = parse(
        "g (float[N] a, float[N] b) => (float y) "
        "{ c = Concat<axis = 0>(a, b) h = Mul(c, half) t = Abs(h) y = Neg(t) }",
        half=np.array(0.5, np.float32),
    )
    first = branches(graph, graph.tensors()["t"])[0]
    assert first.range_after(graph, evaluate, -4, 2) == pytest.approx((0, 2), abs=0.02)
    assert first.range_after(graph, evaluate, np.nan, 2) is None
    assert Branch(first.tensor).range_after(graph, evaluate, -4, 2) == (-4, 2)
