"""What a model computes or stores in 16-bit floats becomes float32; its interface stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.simplify.raise_half import RaiseHalf
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)

BFLOAT16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
# Three roundings to 11 bits of values up to 4.
HALF_ROUNDING = 3 * 4 * 2.0**-11


def f16(*shape: int, seed: int = 0) -> Array:
    return (normal(*shape, seed=seed) / 2).astype(np.float16)


def arithmetic() -> Graph:
    """Computed in float16 throughout; a constant of the graph's type is made, another is cast."""
    return parse(
        """g (float16[B,8] x) => (float16[B,4] y) {
            m = MatMul(x, w)
            a = Add(m, b)
            s = Shape(a)
            o = ConstantOfShape<value = float16[1] {1}>(s)
            k = Cast<to = 10>(n)
            c = Mul(a, k)
            d = Add(c, o)
            y = Clip(d, , high)
        }""",
        w=f16(8, 4),
        b=f16(4),
        n=np.array(2),
        high=np.array(3, np.float16),
    )


def test_golden() -> None:
    graph = arithmetic()
    differential(graph, RaiseHalf(), atol=HALF_ROUNDING)
    check(
        graph,
        """
        CHECK: graph g(%x: f16[B,8]) -> (%y)
        CHECK-NEXT: %x/float32 = Cast(%x) {to=1}
        CHECK-NEXT: %m = MatMul(%x/float32, @w:f32[8,4]
        CHECK-NEXT: %a = Add(%m, @b:f32[4]
        CHECK-NEXT: %s = Shape(%a)
        CHECK-NEXT: %o = ConstantOfShape(%s)
        CHECK-NEXT: %k = Cast(@n:i64[]=2) {to=1}
        CHECK-NEXT: %c = Mul(%a, %k)
        CHECK-NEXT: %d = Add(%c, %o)
        CHECK-NEXT: %y/float32 = Clip(%d, none, @high:f32[]=3.0)
        CHECK-NEXT: %y = Cast(%y/float32) {to=10}
        """,
    )


def test_weights_behind_casts_become_constants_of_their_names() -> None:
    """One copy, however many casts read it; also behind layout operators, and in bfloat16."""
    graph = parse(
        """g (float[B,8] x) => (float[B,8] y) {
            p = Cast<to = 1>(w)
            q = Cast<to = 1>(w)
            m = MatMul(x, p)
            n = MatMul(m, q)
            t = Transpose<perm = [1, 0]>(v)
            r = Cast<to = 1>(t)
            y = MatMul(n, r)
        }""",
        w=f16(8, 8),
        v=normal(8, 8).astype(BFLOAT16),
    )
    ctx = differential(graph, RaiseHalf(), atol=1e-5)
    check(
        graph,
        """
        CHECK: %m = MatMul(%x, @w:f32[8,8]#[[W:[0-9a-f]+]])
        CHECK-NEXT: %n = MatMul(%m, @w:f32[8,8]#[[W]])
        CHECK-NEXT: %t = Transpose(@v:f32[8,8]
        CHECK-NEXT: %y = MatMul(%n, %t)
        """,
    )
    assert ctx.stored_as == {"float16", "bfloat16"}


def test_bfloat16_runs_afterwards() -> None:
    """ONNX Runtime cannot run it before: MatMul has no bfloat16 kernel."""
    w = normal(8, 4).astype(BFLOAT16)
    graph = parse(
        """g (float[B,8] x) => (float[B,4] y) {
            h = Cast<to = 16>(x)
            m = MatMul(h, w)
            r = Relu(m)
            y = Cast<to = 1>(r)
        }""",
        w=w,
    )
    run_pass(graph, RaiseHalf())
    x = normal(3, 8)
    expected = np.maximum(x @ w.astype(np.float32), 0)
    np.testing.assert_allclose(outputs(graph, {"x": x})["y"], expected, atol=1e-5)


def test_islands_of_float32_lose_their_casts() -> None:
    graph = parse(
        """g (float16[B,8] x) => (float16[B,8] y) {
            m = MatMul(x, w)
            f = Cast<to = 1>(m)
            n = LayerNormalization<axis = -1>(f, s)
            h = Cast<to = 10>(n)
            y = Add(h, m)
        }""",
        w=f16(8, 8),
        s=normal(8),
    )
    differential(graph, RaiseHalf(), atol=HALF_ROUNDING)
    assert dump(graph).count("Cast(") == 2  # of the input and the output


BODY = """g (bool c, float16[B,8] x) => (float16[B,8] y) {
    a = Add(x, w)
    r = If (c) <
        then_branch = yes () => (float16[B,8] p) { p = Mul(a, w) },
        else_branch = no () => (float16[B,8] q) { q = Neg(x) }
    >
    y = Add(r, a)
}"""


@pytest.mark.parametrize("chosen", [True, False])
def test_what_bodies_read_stays_as_it_is(chosen: bool) -> None:
    graph = parse(BODY, w=f16(8))
    feed = {"c": np.array(chosen), "x": f16(2, 8, seed=1)}
    ctx = differential(graph, RaiseHalf(), atol=HALF_ROUNDING, feeds=[feed])
    assert [s.reason for s in ctx.skips] == [
        "If passes on the types that its body declares: it stays in float16"
    ]
    check(
        graph,
        """
        CHECK: %x/float32 = Cast(%x) {to=1}
        CHECK: %a/float32 = Add(%x/float32, @w/float32:f32[8]
        CHECK: %a = Cast(%a/float32) {to=10}
        CHECK: %r = If(%c)
        CHECK: %r/float32 = Cast(%r) {to=1}
        CHECK: %y/float32 = Add(%r/float32, %a/float32)
        """,
    )


def test_refuses_operators_of_other_libraries() -> None:
    graph = parse("g (float16[B,8] x) => (float16[B,8] y) { y = other.library.Scale(x) }")
    reason = "Scale is no operator of ONNX or ONNX Runtime: it stays in float16"
    assert_refused(graph, RaiseHalf(), reason)


def test_a_target_with_float16_kernels_keeps_it_in_mode_float() -> None:
    graph = arithmetic()
    before = dump(graph)
    run_pass(graph, RaiseHalf(), ctx=context("cuda", mode="float"))
    assert dump(graph) == before
    run_pass(graph, RaiseHalf(), ctx=context("cuda", mode="weight-only"))
    assert "MatMul(%x/float32, @w:f32" in dump(graph)


def test_weights_behind_casts_are_raised_on_every_target() -> None:
    graph = parse(
        "g (float[B,8] x) => (float[B,8] y) { f = Cast<to = 1>(w) y = MatMul(x, f) }", w=f16(8, 8)
    )
    run_pass(graph, RaiseHalf(), ctx=context("cuda", mode="float"))
    check(graph, "CHECK: %y = MatMul(%x, @w:f32[8,8]")
