"""A model says that it speaks a newer opset, and computes what it did."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest

from qcompile.ir.model_io.to_proto import serialize
from qcompile.ir.operators import REDUCTIONS
from qcompile.passes.simplify import raise_opset
from qcompile.passes.simplify.raise_opset import RaiseOpset
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)

ENCODER = """g (float[B,S,4] x) => (float[B,S,4] y) {
    a = MatMul(x, w)
    b = Softmax<axis = -1>(a)
    c = Erf(b)
    y = Pad(c, pads)
}"""


# Its default placed pixels otherwise before opset 16.
ROI = """g (float[1,1,4,4] x, float[1,4] rois, int64[1] batch) => (float[1,1,1,1] y) {
    y = RoiAlign(x, rois, batch)
}"""
REGION = {
    "x": normal(1, 1, 4, 4),
    "rois": np.array([[0.3, 0.1, 2.2, 3.0]], np.float32),
    "batch": np.array([0]),
}


def test_declares_the_targets_opset() -> None:
    graph = parse(ENCODER, 14, w=normal(4, 4), pads=np.zeros(6, np.int64))
    differential(graph, RaiseOpset(), atol=0)  # exact
    check(
        graph,
        """
        CHECK: graph g{{.*}} opset=17
        CHECK-NEXT: MatMul
        CHECK-NEXT: Softmax
        CHECK-NEXT: Erf
        CHECK-NEXT: Pad
        """,
    )


@pytest.mark.parametrize("to", [18, 20, 21])
def test_axes_and_split_move_on_the_way_over_18(to: int) -> None:
    graph = parse(
        """g (float[B,S,4] x) => (float[B,S,2] y, float[B,S,2] z) {
            m = ReduceMean<axes = [-1]>(x)
            n = ReduceMax<keepdims = 1>(x)
            c = Sub(x, m)
            d = Add(c, n)
            y, z = Split<axis = 2>(d)
        }""",
        13,
    )
    differential(graph, RaiseOpset(to=to), atol=0)
    check(
        graph,
        """
        CHECK: %m = ReduceMean(%x, @{{.*}}/axes:i64[1]=[-1]){{$}}
        CHECK: %n = ReduceMax(%x) {keepdims=1}
        CHECK: %y, %z = Split(%d) {axis=2, num_outputs=2}
        """,
    )
    onnx.checker.check_model(onnx.ModelProto.FromString(serialize(graph)), full_check=True)


def test_split_with_sizes_stays() -> None:
    graph = parse(
        "g (float[N,4] x) => (float[N,3] y, float[N,1] z) { y, z = Split<axis = 1>(x, sizes) }",
        13,
        sizes=np.array([3, 1]),
    )
    differential(graph, RaiseOpset(to=18), atol=0)
    check(graph, "CHECK: %y, %z = Split(%x, @sizes:i64[2]=[3, 1]) {axis=1}")


@pytest.mark.parametrize("to", [17, 18, 19, 21])
def test_operators_that_only_gained_options_stay(to: int) -> None:
    graph = parse(
        """g (float[B,S,4] x) => (float[B,S,4] y) {
            p = Pad(x, pads)
            c = CumSum(p, axis)
            d = Cast<to = 11>(c)
            f = Cast<to = 1>(d)
            q = QuantizeLinear(f, s, z)
            y = DequantizeLinear(q, s, z)
        }""",
        13,
        pads=np.zeros(6, np.int64),
        axis=np.array(1),
        s=np.array(0.05, np.float32),
        z=np.array(128, np.uint8),
    )
    names = [n.op for n in graph.nodes]
    differential(graph, RaiseOpset(to=to), atol=0)
    assert [n.op for n in graph.nodes] == names


# Changed after opset 13 by a new option whose default is what the operator did before.
REVIEWED = {
    "Attention", "CastLike", "GRU", "LSTM", "LpPool", "OptionalHasElement", "RNN", "Range",
    "Reshape", "Shape", "SpaceToDepth",
}  # fmt: skip


def test_no_changed_operator_is_overlooked() -> None:
    """Every new signature since opset 13 is rewritten, refused in time, or known to be harmless."""
    known = REVIEWED | raise_opset._HARMLESS | {*REDUCTIONS, "Split"}
    for name, versions in changed_since(13).items():
        assert name in known or raise_opset._CHANGED.get(name) == versions[0], (name, versions)


def changed_since(opset: int) -> dict[str, list[int]]:
    """Versions in which an operator of ONNX got other inputs, outputs or attributes."""
    found: dict[str, list[int]] = {}
    history = [s for s in onnx.defs.get_all_schemas_with_history() if not s.domain]
    history.sort(key=lambda s: (s.name, s.since_version))
    for old, new in pairwise(history):
        if old.name == new.name and new.since_version > opset and signature(old) != signature(new):
            found.setdefault(new.name, []).append(new.since_version)
    return found


def signature(schema: onnx.defs.OpSchema) -> object:
    operands = [(v.name, str(v.option)) for v in (*schema.inputs, *schema.outputs)]
    defaults = {
        key: (value.required, value.default_value.SerializeToString())
        for key, value in schema.attributes.items()
    }
    return operands, defaults


def test_an_overlooked_operator_would_show() -> None:
    assert changed_since(13)["RoiAlign"] == [16]
    assert "MatMul" not in changed_since(13)


def test_a_newer_model_is_left_alone() -> None:
    graph = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }", 18)
    ctx = run_pass(graph, RaiseOpset())
    assert not ctx.skips
    check(graph, "CHECK: opset=18")


def test_opsets_before_13_go_through_the_converter() -> None:
    """Softmax-12 worked on a matrix of rows; a weight over 64 elements must come back whole."""
    graph = parse(
        """g (float[B,8] x) => (float[B,9] y, float[B,3,3] z) {
            y = MatMul(x, w)
            s = Reshape(y, shape)
            z = Softmax(s)
        }""",
        12,
        w=normal(8, 9),
        shape=np.array([-1, 3, 3]),
    )
    # Exact but for a second rounding of sums of 9 exponentials: the rows are laid out otherwise.
    differential(graph, RaiseOpset(), atol=9 * 2.0**-24)
    check(graph, "CHECK: opset=17\nCHECK: MatMul(%x, @w:f32[8,9]")


def test_an_operator_that_changed_its_meaning_goes_through_the_converter() -> None:
    graph = parse(ROI, 15)
    differential(graph, RaiseOpset(), atol=0, feeds=[REGION])
    check(graph, "CHECK: RoiAlign({{.*}}) {coordinate_transformation_mode='output_half_pixel'}")


@pytest.mark.parametrize("opset", [12, 15])
def test_refuses_what_the_converter_cannot_bring_along(opset: int) -> None:
    graph = parse(
        ROI.replace("y = RoiAlign(x,", "k = com.microsoft.Gelu(x) y = RoiAlign(k,"), opset
    )
    assert_refused(graph, RaiseOpset(), "and the model has operators outside ONNX")


def test_the_same_operator_goes_along_where_its_meaning_did_not_change() -> None:
    graph = parse(ROI, 16)
    differential(graph, RaiseOpset(), atol=0, feeds=[REGION])
    check(graph, "CHECK: %y = RoiAlign(%x, %rois, %batch){{$}}")


def test_refuses_operators_that_onnx_does_not_know() -> None:
    """ONNX Runtime has a few contrib operators in ONNX's own domain."""
    graph = parse("g (float[N] x) => (float[N] y) { a = Relu(x) y = Relu(a) }", 14)
    graph.nodes[0].op = "FusedGelu"
    assert_refused(graph, RaiseOpset(), "FusedGelu is unknown to ONNX")


def test_operators_of_other_domains_are_not_concerned() -> None:
    graph = parse("g (float[N,4] x) => (float[N,4] y) { y = com.microsoft.Gelu(x) }", 14)
    differential(graph, RaiseOpset(), atol=0)
    check(graph, "CHECK: com.microsoft.Gelu(%x)")


def test_refuses_subgraphs_since_their_nodes_cannot_be_brought_along() -> None:
    graph = parse(
        """g (bool c, float[N,4] x) => (float[N,1] y) {
            y = If (c) <
                then_branch = yes () => (float[N,1] p) { p = ReduceMean<axes = [1]>(x) },
                else_branch = no () => (float[N,1] q) { q = ReduceMax<axes = [1]>(x) }
            >
        }""",
        14,
    )
    assert_refused(graph, RaiseOpset(to=18), "in the body of If: ReduceMean has other operands")


def test_bodies_whose_operators_keep_their_meaning_come_along() -> None:
    graph = parse(
        """g (bool c, float[N,4] x) => (float[N,4] y) {
            y = If (c) <
                then_branch = yes () => (float[N,4] p) { p = Softmax(x) },
                else_branch = no () => (float[N,4] q) { q = Neg(x) }
            >
        }""",
        14,
    )
    assert run_pass(graph, RaiseOpset(to=18))
    assert graph.opset == 18
    feed = {"c": np.array(True), "x": normal(2, 4)}
    assert outputs(graph, feed)["y"].sum(1) == pytest.approx([1, 1])


def test_shared_initializers_and_omitted_inputs_come_along() -> None:
    graph = parse(
        """g (float[N,4] x) => (float[N,1] y) {
            a = Clip(x, , s)
            b = Mul(a, w)
            c = Mul(b, w)
            y = ReduceSum(c, axes)
        }""",
        13,
        s=np.array(1, np.float32),
        w=normal(4),
        axes=np.array([1]),
    )
    differential(graph, RaiseOpset(to=20), atol=0)
    check(graph, "CHECK: %y = ReduceSum(%c, @axes:i64[1]=[1])")
