"""Tensors that only scale rows, and those that look like it."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.planning.row_statistics import row_statistics
from qcompile.rewriting.testing import normal, parse

SIGNATURE = "g (float[B,S,32] x, float[B,S,32] z, float[B,S] mask) => (float[B,S,T] y)"


def statistics(nodes: str) -> set[str]:
    graph = parse(
        f"{SIGNATURE} {{ {nodes} }}",
        18,
        two=np.array(2, np.float32),
        root=np.array(-0.5, np.float32),
        eps=np.array(1e-6, np.float32),
        one=np.array(1, np.float32),
        last=np.array([-1]),
        first=np.array([1]),
        w=normal(32, 32),
    )
    return row_statistics(graph)


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        # RMSNorm in its spellings
        ("q = Pow(x, two) m = ReduceMean(q, last) v = Add(m, eps) r = Sqrt(v) f = Div(one, r) "
         "y = Mul(x, f)", {*"qmvrf"}),
        ("q = Mul(x, x) m = ReduceMean(q, last) v = Add(m, eps) r = Sqrt(v) f = Reciprocal(r) "
         "y = Mul(f, x)", {*"qmvrf"}),
        ("q = Pow(x, two) m = ReduceMean(q, last) v = Add(m, eps) f = Pow(v, root) y = Mul(x, f)",
         {*"qmvf"}),
        ("q = Pow(x, two) m = ReduceMean(q, last) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)",
         {*"qmvr"}),
        # the variance of group norm as a difference
        ("q = Mul(x, x) m = ReduceMean(q, last) a = ReduceMean(x, last) b = Mul(a, a) "
         "v = Sub(m, b) r = Sqrt(v) c = Sub(x, a) y = Div(c, r)", {*"qmbvr", "a"}),
        # L2 norm, largest magnitude
        ("n = ReduceL2(x, last) c = Max(n, eps) e = Identity(c) y = Div(x, e)", {*"nce"}),
        ("a = Abs(x) m = ReduceMax(a, last) y = Div(x, m)", {*"am"}),
        # data: pooled, gates of channels, a deviation that is a feature, a mean that is subtracted
        ("m = ReduceMean(x, first) y = MatMul(m, w)", set()),
        ("m = ReduceMean(x, first) s = Sigmoid(m) y = Mul(x, s)", set()),
        ("q = Mul(x, x) m = ReduceMean(q, first) r = Sqrt(m) y = MatMul(r, w)", set()),
        ("m = ReduceMean(x, last) y = Sub(x, m)", set()),
        # a mean over unmasked positions
        ("k = Mul(x, z) s = ReduceSum(k, first) n = ReduceSum(mask, first) y = Div(s, n)", set()),
        # squares with another reader
        ("q = Mul(x, x) m = ReduceMean(q, last) r = Sqrt(m) d = Div(x, r) y = Add(d, q)", {*"mr"}),
        # a softmax in pieces
        ("e = Exp(x) s = ReduceSum(e, last) y = Div(e, s)", {"s"}),
    ],
)  # fmt: skip
def test_what_scales_rows(nodes: str, found: set[str]) -> None:
    assert statistics(nodes) == found
