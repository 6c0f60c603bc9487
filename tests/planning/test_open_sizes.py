"""Tensors that reach further the larger an open dimension is."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.planning.open_sizes import SCORES, SUM, open_sizes
from qcompile.rewriting.testing import normal, parse

SIGNATURE = (
    "g (float[B,S,32] x, float[B,32,S] t, float[B,S,32] z, float[B,16,32] f, float[N,K] m, "
    "float[K,M] k) => (float[B,S,T] y)"
)


def unbounded(nodes: str, reason: str) -> str:
    graph = parse(
        f"{SIGNATURE} {{ {nodes} }}",
        two=np.array(2, np.float32),
        first=np.array([1]),
        last=np.array([-1]),
        w=normal(32, 32),
        gamma=normal(32),
    )
    found = {name for name, why in open_sizes(graph).items() if why == reason} - {"y"}
    return " ".join(sorted(found))


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ("a = MatMul(m, k) y = Neg(a)", "a"),
        ("a = Gemm(m, k) b = Add(a, two) y = Neg(b)", "a b"),
        ("a = Gemm<transA = 1>(m, m) y = Neg(a)", "a"),
        ("a = MatMul(x, t) y = Neg(a)", ""),  # 32 summands, however long the text
        ("a = MatMul(t, x) y = Neg(a)", "a"),
        ("a = MatMul(x, w) y = Neg(a)", ""),
        ("a = ReduceSum(x, first) b = MatMul(a, w) y = Neg(b)", "a b"),
        ("a = ReduceSum(x, last) y = Neg(a)", ""),
        ("a = ReduceSum(f, first) y = Neg(a)", ""),
        ("a = CumSum(x, first) y = Neg(a)", "a"),
        ("a = ReduceMean(x) y = Neg(a)", ""),
        # up to the next normalization
        ("a = MatMul(t, x) b = LayerNormalization(a, gamma) c = MatMul(b, w) y = Neg(c)", "a"),
        ("a = ReduceSum(x, first) s = ReduceSum(z, first) b = Div(a, s) y = Neg(b)", "a s"),
        ("a = MatMul(t, x) b = Tanh(a) y = Neg(b)", "a"),
        # weighted by probabilities, which sum to 1
        ("s = MatMul(x, t) p = Softmax(s) a = MatMul(p, x) y = Neg(a)", ""),
        ("p = Softmax<axis = 1>(x) v = Mul(p, x) a = ReduceSum(v, first) y = Neg(a)", ""),
    ],
)
def test_sums_grow_with_the_dimension_that_they_are_over(nodes: str, found: str) -> None:
    assert unbounded(nodes, SUM) == found


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ("s = MatMul(x, t) y = Softmax(s)", "s"),
        ("s = MatMul(x, t) h = Mul(s, two) b = Add(h, h) y = Softmax(b)", "b h s"),
        ("s = MatMul(x, w) p = Softmax(s) y = Neg(p)", ""),  # rows of 32
        ("s = MatMul(x, w) y = Softmax<axis = 1>(s)", "s"),
        # a softmax in pieces, with its largest value subtracted
        ("s = MatMul(x, t) h = ReduceMax(s) d = Sub(s, h) e = Exp(d) n = ReduceSum(e, last) "
         "y = Div(e, n)", "d s"),
        # hidden states that weight themselves are data all the same
        ("s = Add(x, z) p = Softmax<axis = 1>(s) y = Mul(p, s)", ""),
        ("s = LayerNormalization(x, gamma) y = Softmax<axis = 1>(s)", ""),
    ],
)  # fmt: skip
def test_scores_of_open_rows(nodes: str, found: str) -> None:
    assert unbounded(nodes, SCORES) == found
