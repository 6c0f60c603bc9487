"""Integer weights are moved before they are dequantized."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.simplify.move_dequantize import MoveDequantize
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse

Q = np.random.default_rng(0).integers(-127, 128, (6, 8), np.int8)
STEPS = np.linspace(0.01, 0.02, 6, dtype=np.float32)


def moved(
    body: str, scale: Array = STEPS, axis: int = 0, q: Array = Q, result: str = "float[B,6] y"
) -> Graph:
    """x [B, 8], and a dequantized weight d [6, 8]; ``body`` makes the result."""
    return parse(
        f"""g (float[B,8] x, int64[B] i) => ({result}) {{
            d = DequantizeLinear<axis = {axis}>(q, s, z)
            {body}
        }}""",
        q=q,
        s=scale,
        z=np.zeros(np.shape(scale), np.int8),
        shape=np.array([8, 6]),
        deep=np.array([6, 2, 4]),
        axes=np.array([0]),
    )


def test_golden() -> None:
    graph = moved("t = Transpose<perm = [1, 0]>(d) y = MatMul(x, t)")
    differential(graph, MoveDequantize(), atol=0)
    check(
        graph,
        """
        CHECK: %t/dequantized = DequantizeLinear(@q/moved:i8[8,6]#{{.*}}, @s:{{.*}}) {axis=1}
        CHECK-NEXT: %y = MatMul(%x, %t/dequantized)
        """,
    )


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("r = Reshape(d, deep) y = ReduceSum(r)", 0),
        ("r = Unsqueeze(d, axes) y = ReduceSum(r)", 1),
        ("r = Identity(d) y = ReduceSum(r)", 0),
        ("t = Transpose(d) r = Unsqueeze(t, axes) y = ReduceSum(r)", 2),
    ],
)
def test_scales_follow_their_axis(body: str, axis: int) -> None:
    graph = moved(body, result="float[A,C,D] y" if "Identity" not in body else "float[A,C] y")
    differential(graph, MoveDequantize(), atol=0)
    check(graph, f"CHECK: DequantizeLinear({{{{.*}}}}) {{axis={axis}}}")


def test_rows_are_looked_up_as_integers() -> None:
    graph = moved("y = Gather(d, i)", np.array(0.01, np.float32), 1, result="float[B,8] y")
    graph = moved(
        "e = Gather(d, i) y = Relu(e)", np.array(0.01, np.float32), 1, result="float[B,8] y"
    )
    feed = {"x": normal(3, 8), "i": np.array([5, 0, 2])}
    differential(graph, MoveDequantize(), atol=0, feeds=[feed])
    check(
        graph,
        """
        CHECK: %e/rows = Gather(@q:i8[6,8]#{{.*}}, %i)
        CHECK-NEXT: %e/dequantized = DequantizeLinear(%e/rows
        """,
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = Reshape(d, shape) y = MatMul(x, r)", "it splits or joins the axis of the scales"),
        ("e = Gather(d, i) y = MatMul(x, e)", "the table has a scale per row or column"),
        ("y = Transpose<perm = [1, 0]>(d)", "it carries the name of a graph output"),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    graph = moved(body, result="float[A,C] y")
    assert_refused(graph, MoveDequantize(), reason)


def test_refuses_scales_by_block() -> None:
    graph = parse(
        """g (float[B,8] x) => (float[B,6] y) {
            d = DequantizeLinear<axis = 1, block_size = 4>(q, s)
            t = Transpose<perm = [1, 0]>(d)
            y = MatMul(x, t)
        }""",
        21,
        q=Q,
        s=np.full((6, 2), 0.01, np.float32),
    )
    assert_refused(graph, MoveDequantize(), "the scales are by block")
