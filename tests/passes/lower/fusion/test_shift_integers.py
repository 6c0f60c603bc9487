"""Quantizers that a model brings get the integer types of the kernels, for the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.lower.fusion.shift_integers import ShiftIntegers
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    differential,
    normal,
    parse,
    run_pass,
)

W = np.random.default_rng(0).integers(0, 256, (8, 6), np.uint8)
FAR = {"x": normal(16, 8) * np.float32(20)}  # beyond both ends of the range


def brought(body: str, zero: Array | None = None, results: str = "float[B,6] y") -> Graph:
    point = np.array(-5, np.int8) if zero is None else zero
    return parse(
        f"g (float[B,8] x, int8 p) => ({results}) {{ {body} }}",
        s=np.array(0.05, np.float32),
        z=point,
        w=W,
        t=np.full(6, 0.01, np.float32),
        u=np.full(6, 130, np.uint8),
        k=normal(8, 6),
    )


DATA = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"


def test_golden() -> None:
    graph = brought(f"{DATA} e = DequantizeLinear<axis = 1>(w, t, u) y = MatMul(d, e)")
    differential(graph, ShiftIntegers(), atol=0, feeds=[{**FAR, "p": np.array(0, np.int8)}])
    check(
        graph,
        """
        CHECK-DAG: %q/uint8 = QuantizeLinear(%x, @s:f32[]={{.*}}, @s/zero_point:u8[]=123)
        CHECK-DAG: %d = DequantizeLinear(%q/uint8, @s:f32[]={{.*}}, @s/zero_point_1:u8[]=123)
        CHECK-DAG: %e/int8 = DequantizeLinear(@w/int8:i8[8,6]#{{.*}}:i8[6]=[2, 2, 2, 2, 2, 2])
        CHECK: %y = MatMul(%d, %e/int8)
        """,
    )


def test_a_zero_point_that_is_left_out_is_written() -> None:
    graph = brought("q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = MatMul(d, k)")
    differential(graph, ShiftIntegers(), atol=0, feeds=[{**FAR, "p": np.array(0, np.int8)}])
    check(graph, "CHECK: QuantizeLinear(%x, @s:f32[]={{.*}}, @s/zero_point:u8[]=0)")


@pytest.mark.parametrize(
    ("body", "results", "reason"),
    [
        (f"{DATA} v = Cast<to = 1>(q) y = Add(d, v)", "float[B,8] y", "other than Dequantize"),
        (f"{DATA} y = Add(d, d)", "float[B,8] y, int8[B,8] q", "other than DequantizeLinear"),
        ("q = QuantizeLinear(x, s, p) y = DequantizeLinear(q, s, p)", "float[B,8] y", "computed"),
        (
            f"{DATA} e = Transpose<perm = [1, 0]>(d) y = MatMul(x, e)",
            "float[B,C] y",
            "right operands of matrix multiplications are to be int8",
        ),
    ],
)
def test_refusals(body: str, results: str, reason: str) -> None:
    assert_refused(brought(body, results=results), ShiftIntegers(), reason)


def test_what_the_kernels_take_stays() -> None:
    graph = brought(f"{DATA} y = MatMul(d, k)", np.array(7, np.uint8))
    before = dump(graph)
    ctx = run_pass(graph, ShiftIntegers())
    assert dump(graph) == before
    assert not ctx.skips
