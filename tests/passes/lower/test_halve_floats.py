"""Data in float16, with float32 kept where digits or range would be lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.halve_floats import HalveFloats
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, context, normal, parse, run_pass
from qcompile.runtime.evaluation.float16_emulation import rounding_form
from qcompile.runtime.session import Session

F32 = np.float32
# A result of size 1 to 4 is rounded to 11 bits a few times on its way: 8 half units of 2^-9.
ATOL = 8 * 2.0**-10


def graph(
    body: str,
    inputs: str = "float[B,S,8] x, int64[B,S] mask",
    outputs: str = "float[B,S,8] y",
    opset: int = 17,
    **weights: Array,
) -> Graph:
    read = {n: v for n, v in {"w": normal(8, 8) / F32(3), "b": normal(8), **weights}.items()
            if f"{n}," in body or f"{n})" in body}  # fmt: skip
    return parse(f"g ({inputs}) => ({outputs}) {{ {body} }}", opset, **read)


def feed(made: Graph) -> dict[str, Array]:
    mask = np.ones((2, 5), np.int64)
    mask[0, 3:] = 0
    known = {"x": normal(2, 5, 8), "mask": mask, "c": np.array(True)}
    return {t.name: known[t.name] for t in made.inputs}


def halve(made: Graph, atol: float = ATOL) -> list[str]:
    """Runs the pass; answers stay close, rounded wherever float16 is stored. Gives its reasons."""
    values = feed(made)
    before = Session(serialize(made)).run(values)
    ctx = run_pass(made, HalveFloats(), ctx=context("cuda", mode="float"))
    after = Session(rounding_form(serialize(made))).run(values)
    for name, old in before.items():
        assert after[name].dtype == old.dtype
        np.testing.assert_allclose(after[name], old, atol=atol, err_msg=name)
    reasons = (s.reason for s in ctx.skips if s.pass_name == "halve-floats")
    return [r.removeprefix("float32: ") for r in reasons]


def test_products_and_activations_are_float16_and_the_interface_is_not() -> None:
    made = graph("m = MatMul(x, w) a = Add(m, b) y = Relu(a)")
    assert halve(made) == []
    check(
        made,
        """
        CHECK: graph g(%x: f32[B,S,8], %mask: i64[B,S]) -> (%y)
        CHECK: %x/half = Cast(%x) {to=10}
        CHECK-NEXT: %m = MatMul(%x/half, @w/half:f16[8,8]
        CHECK-NEXT: %a = Add(%m, @b/half:f16[8]
        CHECK-NEXT: %y/half = Relu(%a)
        CHECK-NEXT: %y = Cast(%y/half) {to=1}
        """,
    )
    proto = onnx.load_from_string(serialize(made))
    kinds = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    assert kinds["m"] == onnx.TensorProto.FLOAT16


def test_an_input_is_cast_once_for_all_its_readers() -> None:
    made = graph("m = MatMul(x, w) y = Add(m, x)")
    halve(made)
    assert [n.op for n in made.nodes] == ["Cast", "MatMul", "Add", "Cast"]


def test_an_output_that_is_read_inside_keeps_its_name_and_type() -> None:
    made = graph("y = MatMul(x, w) z = Relu(y)", outputs="float[B,S,8] y, float[B,S,8] z")
    halve(made)
    check(made, "CHECK: %y/half = MatMul(\nCHECK: %z/half = Relu(%y/half)")


@pytest.mark.parametrize(
    "reduce", ["ReduceMean<axes = [-1]>(m)", "ReduceL2<axes = [-1]>(m)", "Exp(m)", "CumSum(m, one)"]
)
def test_sensitive_operators_and_what_reads_them_stay_float32(reduce: str) -> None:
    """Up to the next product, which takes float16 again."""
    made = graph(f"m = MatMul(x, w) r = {reduce} n = Mul(r, b) y = MatMul(n, w)",
                 one=np.array(1))  # fmt: skip
    reasons = halve(made, atol=1.0 if "Exp" in reduce or "Cum" in reduce else ATOL)
    assert reasons == ["a reduction, power or root", "it reads a float32 result"]
    check(
        made,
        """
        CHECK: %m = MatMul(%x/half
        CHECK: %m/float = Cast(%m) {to=1}
        CHECK: %n = Mul(%r, @b:f32[8]
        CHECK: %n/half = Cast(%n) {to=10}
        CHECK: MatMul(%n/half, @w/half:f16
        """,
    )


def test_a_sum_with_an_epsilon_that_float16_cannot_hold_stays_float32() -> None:
    made = graph("m = MatMul(x, w) y = Add(m, eps)", eps=np.array(1e-12, F32))
    assert halve(made) == ["float16 cannot hold its constant 'eps'"]
    check(made, "CHECK: %y = Add(%m/float, @eps:f32[]")


@pytest.mark.parametrize("value", [1e5, -7e4])
def test_a_factor_beyond_float16_stays_float32(value: float) -> None:
    made = graph("m = MatMul(x, w) n = Mul(m, k) y = Div(n, k)", k=np.array(value, F32))
    assert halve(made)[0] == "float16 cannot hold its constant 'k'"


def test_bounds_beyond_float16_bind_nothing_and_are_cut() -> None:
    made = graph("m = MatMul(x, w) y = Max(m, low)", low=np.array(-3.4e38, F32))
    assert halve(made) == []
    check(made, "CHECK: Max(%m, @low/half:f16[]=-65504")


MASK = """f = Cast<to = 1>(mask) u = Unsqueeze(f, last) hidden = Sub(one, u)
    bias = Mul(hidden, low) m = MatMul(x, w) s = Add(m, bias) y = Softmax<axis = 1>(s)"""
CONSTANTS: dict[str, Any] = {
    "last": np.array([-1]),
    "one": np.array(1, F32),
    "low": np.array(-3.4e38, F32),
}


def test_masks_are_made_in_float32_and_finite_where_they_meet_data() -> None:
    made = graph(MASK, **CONSTANTS)
    assert halve(made) == []
    check(
        made,
        """
        CHECK: %bias = Mul(%hidden, @low:f32[]
        CHECK: %bias/finite = Clip(%bias, @masked:f32[]=-32768
        CHECK-NEXT: %bias/half = Cast(%bias/finite) {to=10}
        CHECK: %s = Add(%m, %bias/half)
        """,
    )


def test_a_row_that_is_masked_whole_is_no_nan() -> None:
    """With -inf in place of -3.4e38 it would be: softmax of nothing but -inf."""
    made = graph(MASK, **CONSTANTS)
    run_pass(made, HalveFloats(), ctx=context("cuda", mode="float"))
    values = {"x": normal(1, 4, 8), "mask": np.zeros((1, 4), np.int64)}
    y = Session(rounding_form(serialize(made))).run(values)["y"]
    assert np.isfinite(y).all()


def test_a_mask_by_where_gets_a_finite_constant() -> None:
    body = "m = MatMul(x, w) g = Cast<to = 9>(mask) u = Unsqueeze(g, last) y = Where(u, m, low)"
    made = graph(body, **{n: CONSTANTS[n] for n in ("last", "low")})
    run_pass(made, HalveFloats(), ctx=context("cuda", mode="float"))
    check(made, "CHECK: Where(%u, %m, @low/half:f16[]=-32768")


def test_an_integer_is_cast_in_one_step() -> None:
    body = "u = Unsqueeze(mask, last) f = Cast<to = 1>(u) m = MatMul(x, w) y = Mul(m, f)"
    made = graph(body, last=np.array([-1]))
    halve(made)
    check(made, "CHECK: %f/half = Cast(%u) {to=10}")


def test_a_subgraph_goes_on_reading_float32() -> None:
    body = """m = MatMul(x, w) r = If (c) <
        then_branch = yes () => (float[B,S,8] p) { p = Neg(m) },
        else_branch = no () => (float[B,S,8] q) { q = Abs(m) }
    > y = MatMul(r, w)"""
    made = graph(body, "float[B,S,8] x, bool c")
    assert halve(made) == ["its body reads float32"]
    check(made, "CHECK: %m/half = MatMul(\nCHECK: %m = Cast(%m/half) {to=1}")


def test_a_type_that_no_kernel_takes_stays_float32() -> None:
    made = graph("m = MatMul(x, w) y = Hardmax(m)")
    assert halve(made, atol=1.0) == ["Hardmax has no float16 kernel"]


def test_what_gives_the_same_for_both_types_reads_what_is_there() -> None:
    body = "m = MatMul(x, w) s = Shape(m) f = Cast<to = 7>(m) y = Cast<to = 1>(f)"
    made = graph(f"{body} z = Reshape(f, s)", outputs="float[B,S,8] y, int64[B,S,8] z")
    run_pass(made, HalveFloats(), ctx=context("cuda", mode="float"))
    check(made, "CHECK: %s = Shape(%m)\nCHECK: %f = Cast(%m) {to=7}")


def test_normalization_and_softmax_take_float16() -> None:
    made = graph("m = MatMul(x, w) n = LayerNormalization(m, b, b) y = Softmax<axis = -1>(n)")
    assert halve(made) == []


def test_refuses_a_target_without_float16() -> None:
    made = graph("y = MatMul(x, w)")
    assert_refused(made, HalveFloats(), "target 'cpu' has no float16")
