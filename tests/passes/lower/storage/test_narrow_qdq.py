"""Weights of few bits become INT4 and INT2, and no number changes by more than float rounding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.passes.lower.storage.narrow_qdq import NOTE, NarrowQdq
from qcompile.planning import Context, Decision
from qcompile.quant import Array, QSpec
from qcompile.rewriting.testing import (
    assert_equivalent,
    assert_refused,
    check,
    context,
    normal,
    outputs,
    parse,
    run_pass,
)

INPUTS, OUTPUTS = 40, 6
LINEAR = """g (float[B,40] x) => (float[B,6] y) {
    d = DequantizeLinear<axis = 1>(w, s, z)
    y = MatMul(x, d)
}"""
TABLE = """g (int64[N] i) => (float[N,40] y) {
    d = DequantizeLinear<axis = 0>(w, s, z)
    y = Gather(d, i)
}"""
KERNEL = """g (float[B,4,5,5] x) => (float[B,6,3,3] y) {
    d = DequantizeLinear<axis = 0>(w, s, z)
    y = Conv(x, d)
}"""
SCALE = normal(OUTPUTS) ** 2 + np.float32(0.01)


def codes(bits: int, *shape: int) -> Array:
    """Codes of which both ends are taken in each column, int8."""
    half = 1 << bits - 1
    found = np.random.default_rng(bits).integers(-half, half, shape).astype(np.int8)
    found[:2] = np.array([-half, half - 1]).reshape(2, *[1] * (len(shape) - 1))
    return found


def blocked(bits: int, block: int = 16) -> Array:
    """Codes (INPUTS, OUTPUTS) times another integer in each block."""
    multipliers = np.random.default_rng(1).integers(1, 8, (-(-INPUTS // block), OUTPUTS))
    multipliers[0], multipliers[1] = 3, 5  # no one of them for a whole output
    by_input = np.repeat(multipliers, block, axis=0)[:INPUTS]
    return (codes(bits, INPUTS, OUTPUTS) * by_input).astype(np.int8)


def planned(
    weight: Array, text: str = LINEAR, opset: int = 25, width: int | None = 4
) -> tuple[Graph, Context]:
    """A graph after insert-qdq, whose weight was planned to have ``width`` bits."""
    axis = 1 if text is LINEAR else 0
    graph = parse(text, opset, w=weight, s=SCALE, z=np.zeros(OUTPUTS, np.int8))
    ctx = context("qdq")
    ctx.origins["w"] = ("weight", 20.0)
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=axis, width=width)
    ctx.plan.decide(Decision("weight", "weight", spec, "planned"))
    return graph, ctx


def feed_of(graph: Graph) -> dict[str, Array]:
    if graph.inputs[0].name == "i":
        return {"i": np.arange(OUTPUTS)}
    return {"x": normal(3, *graph.inputs[0].shape[1:])}


def narrowed(graph: Graph, ctx: Context, rtol: float = 0.0) -> onnx.ModelProto:
    """The model after the pass: valid, and with the same outputs wherever it runs as written."""
    feed = feed_of(graph)
    before = outputs(graph, feed)
    run_pass(graph, NarrowQdq(), ctx=ctx)
    largest = max(float(np.abs(v).max()) for v in before.values())
    assert_equivalent(before, outputs(graph, feed), atol=rtol * largest)
    model = to_proto(graph)
    onnx.checker.check_model(model, full_check=True)
    (found,) = ReferenceEvaluator(model).run(None, feed)
    # Another order of summing INPUTS products, each off by half a unit in the last place.
    np.testing.assert_allclose(np.asarray(found), before["y"], atol=INPUTS * 2.0**-24 * largest)
    return model


def test_codes_of_4_bits_become_int4() -> None:
    graph, ctx = planned(codes(4, INPUTS, OUTPUTS), opset=21)
    model = narrowed(graph, ctx)
    check(
        graph,
        """
        CHECK: graph g{{.*}} opset=21
        CHECK-NEXT: %d = DequantizeLinear(@weight/int4:i4[40,6]{{[^ ]+}}, @s:f32[6]
        CHECK-SAME: @weight/int4_zero_point:i4[6]{{[^ ]+}}) {axis=1}
        CHECK-NEXT: %y = MatMul(%x, %d)
        """,
    )
    assert model.ir_version == 10
    assert ctx.origins["weight/int4"] == ("weight", 20.0)
    assert "4 or 2 bits (1 here)" in ctx.remarks[NOTE]
    stored = {t.name: t for t in model.graph.initializer}
    assert len(stored["weight/int4"].raw_data) == INPUTS * OUTPUTS // 2


def test_codes_of_3_bits_become_int4_too() -> None:
    graph, ctx = planned(codes(3, INPUTS, OUTPUTS), width=3)
    narrowed(graph, ctx)
    check(graph, "CHECK: DequantizeLinear(@weight/int4:i4[40,6]")


def test_codes_of_2_bits_become_int2() -> None:
    graph, ctx = planned(codes(2, INPUTS, OUTPUTS), width=2)
    model = narrowed(graph, ctx)
    check(graph, "CHECK: DequantizeLinear(@weight/int2:i2[40,6]{{[^ ]+}}, @s:f32[6]")
    assert model.ir_version == 13
    stored = {t.name: t for t in model.graph.initializer}
    assert len(stored["weight/int2"].raw_data) == INPUTS * OUTPUTS // 4


def test_codes_without_zero_become_int4() -> None:
    """INT2 has no ±1, ±3."""
    odd = (2 * codes(2, INPUTS, OUTPUTS) + 1).astype(np.int8)
    graph, ctx = planned(odd, width=2)
    narrowed(graph, ctx)
    check(graph, "CHECK: DequantizeLinear(@weight/int4:i4[40,6]{{[^ ]+}}, @s:f32[6]")


def test_before_opset_25_codes_of_2_bits_become_int4() -> None:
    graph, ctx = planned(codes(2, INPUTS, OUTPUTS), opset=21, width=2)
    model = narrowed(graph, ctx)
    check(graph, "CHECK: DequantizeLinear(@weight/int4:i4[40,6]")
    assert [s.reason for s in ctx.skips] == [
        "INT2 needs opset 25, the model stays at 21: stored as INT4"
    ]
    assert model.ir_version == 10


@pytest.mark.parametrize(("bits", "opset"), [(4, 21), (2, 25)])
def test_multipliers_become_part_of_the_scales_of_blocks(bits: int, opset: int) -> None:
    graph, ctx = planned(blocked(bits), opset=opset, width=bits)
    # Three roundings in place of two, and two orders of summing INPUTS products.
    narrowed(graph, ctx, rtol=INPUTS * 2.0**-23)
    check(
        graph,
        f"""
        CHECK: %d = DequantizeLinear(@weight/int{bits}:i{bits}[40,6]
        CHECK-SAME: @weight/block_scale:f32[3,6]
        CHECK-SAME: @weight/int{bits}_zero_point:i{bits}[3,6]
        CHECK-SAME: {{axis=0, block_size=16}}
        """,
    )


def test_blocks_are_exact_with_scales_of_17_bits() -> None:
    """Products of 17, 3 and 4 bits fit into the 24 of float32, in any order."""
    graph, ctx = planned(blocked(4))
    short = (SCALE.view(np.uint32) >> 7 << 7).view(np.float32)
    (node,) = [n for n in graph.nodes if n.op == "DequantizeLinear"]
    graph.set_constant(node, 1, short)
    narrowed(graph, ctx)  # bit-equal


def test_a_negative_multiplier_negates_its_codes() -> None:
    """7 times -5 is -7 times 5: scales stay positive."""
    weight = blocked(4)
    weight[16:32] = np.clip(-weight[16:32], -35, 35)
    graph, ctx = planned(weight)
    narrowed(graph, ctx, rtol=INPUTS * 2.0**-23)
    check(graph, "CHECK: DequantizeLinear(@weight/int4:i4[40,6]")
    assert (graph.constants()["weight/block_scale"].values > 0).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_that_have_no_counterpart_have_a_zero_point(bits: int) -> None:
    """Eight times -5 is in no block of INT4 with a positive scale."""
    weight = blocked(bits)
    weight[:16] = -weight[:16]
    graph, ctx = planned(weight, width=bits)
    narrowed(graph, ctx, rtol=INPUTS * 2.0**-23)
    check(
        graph,
        f"""
        CHECK: DequantizeLinear(@weight/uint{bits}:u{bits}[40,6]
        CHECK-SAME: @weight/uint{bits}_zero_point:u{bits}[3,6]
        CHECK-SAME: {{axis=0, block_size=16}}
        """,
    )
    half = 1 << bits - 1
    zeros = graph.constants()[f"weight/uint{bits}_zero_point"].values.astype(np.int8)
    assert (zeros[0] == half - 1).all() and (zeros[1:] == half).all()
    assert (graph.constants()["weight/block_scale"].values > 0).all()


def test_a_channel_whose_codes_reach_8_has_a_zero_point() -> None:
    """Codes from -7 to 8 are -1 times codes from -8 to 7."""
    weight = codes(4, INPUTS, OUTPUTS)
    weight[:, ::2] = -weight[:, ::2]
    graph, ctx = planned(weight)
    narrowed(graph, ctx)
    check(
        graph,
        """
        CHECK: DequantizeLinear(@weight/uint4:u4[40,6]{{[^ ]+}}, @weight/block_scale:f32[6]
        CHECK-SAME: @weight/uint4_zero_point:u4[6]{{[^ ]*}}) {axis=1}
        """,
    )


def test_a_table_has_its_blocks_along_the_channels() -> None:
    graph, ctx = planned(np.ascontiguousarray(blocked(4).T), TABLE)
    # Nothing is summed: two units in the last place.
    narrowed(graph, ctx, rtol=2.0**-22)
    check(
        graph,
        """
        CHECK: %d = DequantizeLinear(@weight/int4:i4[6,40]{{[^ ]+}}, @weight/block_scale:f32[6,3]
        CHECK-SAME: {axis=1, block_size=16}
        CHECK-NEXT: Gather(%d, %i)
        """,
    )


def test_a_table_with_a_scale_by_row() -> None:
    graph, ctx = planned(np.ascontiguousarray(codes(2, INPUTS, OUTPUTS).T), TABLE)
    narrowed(graph, ctx)
    check(graph, "CHECK: DequantizeLinear(@weight/int2:i2[6,40]{{[^ ]+}}, @s:f32[6]")


def test_a_kernel_with_a_scale_by_channel() -> None:
    graph, ctx = planned(codes(4, OUTPUTS, 4, 3, 3), KERNEL)
    narrowed(graph, ctx)
    check(graph, "CHECK: DequantizeLinear(@weight/int4:i4[6,4,3,3]{{[^ ]+}}, @s:f32[6]")


REFUSED = {
    "opset": (codes(4, INPUTS, OUTPUTS), LINEAR, 20, "INT4 needs opset 21, the model stays at 20"),
    "bits": (codes(5, INPUTS, OUTPUTS), LINEAR, 25, "codes from -16 to 15 do not fit into INT4"),
    "8 bits": (codes(8, INPUTS, OUTPUTS), LINEAR, 25, "codes from -128 to 127 do not fit"),
    "kernel": (
        np.ascontiguousarray(blocked(4)[:36].T.reshape(OUTPUTS, 4, 3, 3)),
        KERNEL,
        25,
        "DequantizeLinear has no blocks over several axes, [6, 4, 3, 3]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_onnx_cannot_store_stays_int8(case: str) -> None:
    weight, text, opset, reason = REFUSED[case]
    graph, ctx = planned(weight, text, opset)
    assert_refused(graph, NarrowQdq(), reason, ctx)
    assert all(s.reason.endswith(": stays int8") for s in ctx.skips)
    assert NOTE not in ctx.remarks


def test_factors_by_row_that_do_not_fit_into_codes_stay_int8() -> None:
    weight = blocked(4) // 2
    weight[::2] *= 4
    graph, ctx = planned(np.clip(weight, -128, 127))
    assert_refused(graph, NarrowQdq(), "do not fit into INT4: stays int8", ctx)


def test_weights_of_8_bits_are_left_alone() -> None:
    """Whatever their values are: nobody asked for few bits."""
    graph, ctx = planned(codes(2, INPUTS, OUTPUTS), width=None)
    run_pass(graph, NarrowQdq(), ctx=ctx)
    check(graph, "CHECK: DequantizeLinear(@w:i8[40,6]")
    assert ctx.skips == [] and NOTE not in ctx.remarks


@pytest.mark.parametrize("bits", [2, 4])
def test_the_checker_of_these_tests_sees_another_scale(bits: int) -> None:
    graph, ctx = planned(codes(bits, INPUTS, OUTPUTS), width=bits)
    before = outputs(graph, feed_of(graph))
    run_pass(graph, NarrowQdq(), ctx=ctx)
    (node,) = [n for n in graph.nodes if n.op == "DequantizeLinear"]
    graph.set_constant(node, 1, SCALE * np.float32(1 + 2.0**-20))
    with pytest.raises(AssertionError, match="y"):
        assert_equivalent(before, outputs(graph, feed_of(graph)), atol=0)
