"""Tensors of rows that sum to 1, and the length of these rows."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.planning.probabilities import OPEN, probability_rows
from qcompile.rewriting.testing import normal, parse

SIGNATURE = "g (float[B,S,32] x, float[B,S,32] z, float[B,2] head_mask) => (float[B,S,T] y)"


def rows(nodes: str) -> dict[str, float]:
    graph = parse(
        f"{SIGNATURE} {{ {nodes} }}",
        zero=np.array(0, np.float32),
        eps=np.array(1e-6, np.float32),
        last=np.array([-1]),
        shape=np.array([0, -1, 8]),
        w=normal(32, 32),
    )
    return {name: length for name, length in probability_rows(graph).items() if name != "y"}


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ("p = Softmax<axis = -1>(x) y = Neg(p)", {"p": 32}),
        ("p = Softmax(x) y = Neg(p)", {"p": 32}),
        ("p = Softmax<axis = 1>(x) y = Neg(p)", {"p": OPEN}),
        ("p = LogSoftmax(x) y = Neg(p)", {}),
        ("p = Softmax(x) t = Transpose(p) r = Reshape(t, shape) y = Neg(r)",
         {"p": 32, "t": 32, "r": 32}),
        ("p = Softmax(x) n = IsNaN(p) w0 = Where(n, zero, p) y = Neg(w0)", {"p": 32, "w0": 32}),
        ("p = Softmax(x) m = Mul(p, eps) y = Neg(m)", {"p": 32, "m": 32}),
        ("p = Softmax(x) m = ReduceMean(p) y = Neg(m)", {"p": 32, "m": 32}),
        ("p = Softmax(x) m = ReduceMax(p) y = Neg(m)", {"p": 32}),
        ("p = Softmax(x) q = Softmax(z) d = Sub(p, q) y = Neg(d)", {"p": 32, "q": 32, "d": 32}),
        ("p = Softmax(x) d = Add(p, z) y = Neg(d)", {"p": 32}),
        ("p = Softmax(x) d = Div(p, z) y = Neg(d)", {"p": 32, "d": 32}),
        ("p = Softmax(x) d = Div(z, p) y = Neg(d)", {"p": 32}),
        ("p = Softmax(x) d = MatMul(p, w) y = Neg(d)", {"p": 32}),
        # data that is weighted: of a known length it was calibrated, of an open length it was not
        ("p = Softmax(x) m = Mul(p, z) y = Neg(m)", {"p": 32}),
        ("p = Softmax<axis = 1>(x) m = Mul(z, p) y = Neg(m)", {"p": OPEN, "m": OPEN}),
    ],
)  # fmt: skip
def test_rows_come_from_softmax_and_stay_where_values_are_kept(
    nodes: str, found: dict[str, float]
) -> None:
    assert rows(nodes) == found


def test_two_steps_of_attention_are_rows_again() -> None:
    found = rows(
        "t = Transpose<perm = [0, 2, 1]>(x) s = MatMul(x, t) p = Softmax(s) r = MatMul(p, p) "
        "c = MatMul(r, x) y = Neg(c)"
    )
    assert found == {"p": OPEN, "r": OPEN}


@pytest.mark.parametrize(
    ("total", "axes_known"),
    [
        ("s = ReduceSum(e, last)", True),
        ("r = ReduceSum(e, last) s = Add(r, eps)", True),
        ("r = ReduceSum(e, last) c = Clip(r, eps) s = Identity(c)", True),
        ("s = ReduceSum(e)", False),
    ],
)
def test_a_division_by_the_own_sum(total: str, axes_known: bool) -> None:
    length = 32 if axes_known else OPEN
    found = rows(f"e = Exp(x) {total} p = Div(e, s) y = Neg(p)")
    assert found == {"e": length, "p": length}


@pytest.mark.parametrize(
    "nodes",
    [
        "e = Exp(x) s = ReduceSum(z, last) p = Div(e, s) y = Neg(p)",
        "e = Exp(x) s = ReduceMax<axes = [-1]>(e) p = Div(e, s) y = Neg(p)",
        "s = Add(x, eps) p = Div(x, s) y = Neg(p)",
    ],
)
def test_any_other_division_is_none(nodes: str) -> None:
    assert rows(nodes) == {}
