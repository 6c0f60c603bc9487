"""Constants by which a node multiplies, and nodes that only look as if they did."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import is_plain_gemm, scaled_operand
from qcompile.rewriting.testing import parse

F32 = np.float32


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Mul(x, two)", ("x", 2.0)),
        ("y = Mul(two, x)", ("x", 2.0)),
        ("y = Div(x, two)", ("x", 0.5)),
        ("y = Div(two, x)", None),
        ("y = Mul(x, zero)", None),
        ("y = Div(x, zero)", None),
        ("y = Mul(x, infinite)", None),
        ("y = Mul(x, x)", None),
        ("y = Mul(x, vector)", None),
        ("y = Mul(two, zero)", None),
        ("y = Add(x, two)", None),
    ],
)
def test_scaled_operand(body: str, expected: tuple[str, float] | None) -> None:
    graph = parse(
        f"g (float[2,2] x) => (float[2,2] y) {{ {body} }}",
        two=np.array(2, F32),
        zero=np.zeros(1, F32),
        infinite=np.array(np.inf, F32),
        vector=np.ones(2, F32),
    )
    found = scaled_operand(graph.nodes[0])
    assert (None if found is None else (found[0].name, found[1])) == expected


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("MatMul(x, x)", True),
        ("Gemm<transB = 1>(x, x, x)", True),
        ("Gemm<alpha = 1.0, beta = 1.0, transA = 0>(x, x, x)", True),
        ("Gemm<alpha = 2.0>(x, x, x)", False),
        ("Gemm<beta = 2.0>(x, x, x)", False),
        ("Gemm<transA = 1>(x, x, x)", False),
    ],
)
def test_plain_gemm(operator: str, expected: bool) -> None:
    graph = parse(f"g (float[2,2] x) => (float[2,2] y) {{ y = {operator} }}")
    assert is_plain_gemm(graph.nodes[0]) is expected
