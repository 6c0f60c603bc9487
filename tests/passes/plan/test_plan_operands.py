"""Which operands become integers, which stay float, and why. The graph itself stays as it is."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.errors import RecipeError
from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    context,
    filecheck,
    normal,
    parse,
    plan_text,
    run_pass,
)

INT = "MatMulIntegerToFloat: uint8 x int8 with the bias inside"


def plan(graph: Graph, directives: str, ctx: Context | None = None) -> Context:
    """Plan, which edits nothing (so answers are bit-equal), and check the decisions."""
    before = dump(graph)
    ctx = run_pass(graph, PlanOperands(), ctx=ctx)
    assert dump(graph) == before
    filecheck(plan_text(ctx), directives)
    return ctx


def linear(body: str = "y = MatMul(x, w)", x: str = "float[N,8] x", **weights: Array) -> Graph:
    return parse(f"g ({x}) => (float[N,4] y) {{ {body} }}", **weights)


def test_weight_by_output_channel_and_data_by_tensor() -> None:
    ctx = plan(
        linear(w=normal(8, 4)),
        f"""
        CHECK: weight w: int8:sym:channel[1]:pairs at MatMul:y.1 because {INT}
        CHECK-NEXT: activation x: uint8:asym:tensor at MatMul:y.0 because {INT}
        """,
    )
    assert [(r.tensor, str(r.spec)) for r in ctx.requests] == [("x", "uint8:asym:tensor")]
    assert not ctx.skips


def test_dynamic_mode_asks_for_no_range() -> None:
    ctx = plan(
        linear(w=normal(8, 4)), "CHECK: activation x: uint8:asym:tensor", context(mode="dynamic")
    )
    assert not ctx.requests


def test_weight_only_mode_leaves_the_data() -> None:
    ctx = plan(
        linear(w=normal(8, 4)),
        """
        CHECK: weight w: int8:sym:channel[1] at MatMul:y.1 because MatMulNBits: integers
        CHECK-NEXT: activation x: float at MatMul:y.0 because only weights are quantized
        """,
        context(mode="weight-only"),
    )
    assert not ctx.requests


def test_query_key_and_value_share_one_activation() -> None:
    graph = linear(
        "a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v) d = Add(a, b) y = Add(d, c)",
        q=normal(8, 4),
        k=normal(8, 4),
        v=normal(8, 4),
    )
    ctx = plan(graph, "CHECK: activation x: uint8{{.*}} at MatMul:a.0, MatMul:b.0, MatMul:c.0")
    assert len(ctx.requests) == 1


def test_a_shared_weight_has_one_decision() -> None:
    graph = linear("a = MatMul(x, w) y = MatMul(a, w)", "float[N,4] x", w=normal(4, 4))
    plan(graph, "CHECK: weight w: int8:sym:channel[1]:pairs at MatMul:a.1, MatMul:y.1")


def test_a_transposed_gemm_has_its_channels_on_axis_0() -> None:
    graph = linear("y = Gemm<transB = 1>(x, w, )", w=normal(4, 8))
    plan(graph, "CHECK: weight w: int8:sym:channel[0]:pairs at Gemm:y.1")


TABLE = "g (int64[N] i, float[V,4] t) => (float[N,4] y) { y = Gather(t, i) }"


@pytest.mark.parametrize("mode", ["static", "weight-only"])
def test_embeddings_by_row_from_1_mib_on(mode: str) -> None:
    """The indices are no operand that could be quantized: no decision about them."""
    for rows, reason in ((65536, "rows are looked up as int8"), (65535, "table under 1 MiB")):
        spec = "int8:sym:channel[0]" if rows == 65536 else "float"
        plan(
            parse(TABLE, t=np.ones((rows, 4), np.float32)),
            f"""
            CHECK: weight t: {spec} at Gather:y.0 because {reason}
            CHECK-NOT: activation
            """,
            context(mode=mode),
        )


@pytest.mark.parametrize("pattern", ["MatMul:a", "w", "x", "a", "*:a", "[wz]"])
def test_keep_float_names_nodes_or_tensors(pattern: str) -> None:
    graph = linear(
        "a = MatMul(x, w) y = MatMul(a, v)", "float[N,4] x", w=normal(4, 4), v=normal(4, 4)
    )
    ctx = plan(
        graph,
        f"""
        CHECK: weight w: float at MatMul:a.1 because kept float by pattern '{pattern}'
        CHECK: activation x: float at MatMul:a.0 because kept float by pattern '{pattern}'
        """,
        context(keep_float=(pattern,)),
    )
    assert ctx.skips[0].node == "MatMul:a"


def test_keep_float_without_a_match_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"'layer\.\*' matches no node and no tensor"):
        run_pass(linear(w=normal(8, 4)), PlanOperands(), ctx=context(keep_float=("x", "layer.*")))


def test_keep_float_may_name_what_an_earlier_pass_renamed() -> None:
    ctx = context(keep_float=("old",))
    ctx.original_names = frozenset({"old"})
    plan(linear(w=normal(8, 4)), "CHECK: weight w: int8", ctx)


def test_refuses_opsets_without_scales_by_channel() -> None:
    graph = parse("g (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", 12, w=normal(8, 4))
    ctx = assert_refused(graph, PlanOperands(), "opset 12 has no per-channel Q/DQ, needs 13")
    assert not ctx.plan.decisions


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_weights_without_a_range(value: float) -> None:
    weight = normal(8, 4)
    weight[3, 2] = value
    refused(linear(w=weight), "w", "the weight holds NaN or infinity")


def test_refuses_an_empty_weight() -> None:
    graph = linear(x="float[N,0] x", w=normal(0, 4))
    refused(graph, "w", "the weight is empty")


def test_refuses_a_weight_on_the_left() -> None:
    graph = parse("g (float[8,N] x) => (float[4,N] y) { y = MatMul(w, x) }", w=normal(4, 8))
    refused(graph, "w", "the weight is the left operand")


def test_refuses_a_weight_of_rank_3() -> None:
    graph = parse("g (float[2,N,8] x) => (float[2,N,4] y) { y = MatMul(x, w) }", w=normal(2, 8, 4))
    refused(graph, "w", "the weight has rank 3, a matrix is expected")


@pytest.mark.parametrize("attribute", ["transA = 1", "alpha = 0.5", "beta = 2.0"])
def test_refuses_a_gemm_that_is_no_plain_product(attribute: str) -> None:
    graph = linear(f"y = Gemm<{attribute}>(x, w)", "float[8,8] x", w=normal(8, 4))
    refused(graph, "w", "Gemm with transA, alpha or beta")


def test_refuses_a_lookup_of_columns() -> None:
    graph = parse(
        "g (int64[N] i) => (float[4,N] y) { y = Gather<axis = 1>(t, i) }",
        t=np.ones((4, 65536), np.float32),
    )
    refused(graph, "t", "the lookup is not along the rows of the table")


def test_refuses_data_of_unknown_type() -> None:
    graph = parse(
        "g (float[N,8] x) => (float[N,4] y) { a = com.microsoft.Op(x) y = MatMul(a, w) }",
        w=normal(8, 4),
    )
    refused(graph, "w", "the data operand is not float32")


def refused(graph: Graph, weight: str, reason: str) -> None:
    """The weight stays float for this reason, which the report tells too; nothing is asked for."""
    ctx = plan(graph, f"CHECK: weight {weight}: float at {{{{.*}}}} because {reason}")
    assert [s.reason for s in ctx.skips] == [reason]
    assert not ctx.requests
    assert not list(ctx.plan.quantized())


def test_operators_that_the_target_computes_in_float_have_a_decision_too() -> None:
    graph = parse(
        """g (float[N,4] x, float[N,4] z) => (float[N,N] y) {
            t = Transpose(z)
            m = MatMul(x, t)
            s = Softmax(m)
            e = Exp(s)
            y = Add(e, e)
        }""",
        g=normal(4),
        r=normal(2, 4),
    )
    plan(
        graph,
        """
        CHECK: activation x: float at MatMul:m.0 because multiplies two activations
        CHECK: activation t: float at MatMul:m.1 because multiplies two activations
        CHECK: activation m: float at Softmax:s.0 because ONNX Runtime's integer Softmax
        CHECK: activation e: float at Add:y.0, Add:y.1 because an integer Add
        CHECK-NOT: Exp:e
        """,
    )


def test_only_matrices_beside_them_count_as_weights() -> None:
    graph = linear("a = Add(x, b) y = Add(a, r)", "float[N,4] x", b=normal(4), r=normal(1, 4))
    plan(
        graph,
        """
        CHECK: activation x: float at Add:a.0
        CHECK-NEXT: activation a: float at Add:y.0
        CHECK-NEXT: weight r: float at Add:y.1 because an integer Add
        CHECK-NOT: because
        """,
    )


def test_integers_and_vectors_are_no_operands_to_quantize() -> None:
    graph = parse(
        """g (int64[N] i, float[N,8] x) => (int64[N,4] y, float[N] z) {
            g = Gather(t, i)
            y = Add(g, g)
            z = MatMul(x, v)
        }""",
        t=np.ones((65536, 4), np.int64),
        v=normal(8),
    )
    plan(
        graph,
        """
        CHECK: activation x: float at MatMul:z.0 because
        CHECK-NOT: because
        """,
    )


def test_graph_outputs_and_subgraph_readers_do_not_matter() -> None:
    """Only the planned uses will change: others go on reading the float tensor."""
    graph = parse(
        """g (bool c, float[4,4] x) => (float[4,4] a, float[4,4] y) {
            a = MatMul(x, w)
            b = MatMul(a, w)
            i = If (c) <
                then_branch = yes () => (float[4,4] p) { p = MatMul(a, w) },
                else_branch = no () => (float[4,4] q) { q = Neg(w) }
            >
            y = Exp(i)
        }""",
        w=normal(4, 4),
    )
    plan(
        graph,
        """
        CHECK: weight w: int8:sym:channel[1]:pairs at MatMul:a.1, MatMul:b.1 because
        CHECK: activation a: uint8:asym:tensor at MatMul:b.0 because
        """,
    )
