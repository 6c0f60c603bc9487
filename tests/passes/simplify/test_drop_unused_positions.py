"""The last layer computes the positions that the outputs use, and gives the same answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from qcompile.ir import Graph, is_op
from qcompile.ir.analysis import shape_inference
from qcompile.ir.pooling import PoolingKind, add_pooling
from qcompile.passes.lower.remove_padding import RemovePadding
from qcompile.passes.simplify.drop_unused_positions import NOTE, DropUnusedPositions
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_equivalent,
    assert_refused,
    check,
    differential,
    encoder,
    normal,
    outputs,
    parse,
    run_pass,
)

# Kernels may add in another order for another number of rows: up to 32 products of values up to
# about 8, over two layers.
ATOL = 1e-5
HEADS = np.array([0, 0, 2, 4])
WEIGHTS = {n: normal(8, 8, seed=i) * np.float32(0.5) for i, n in enumerate(("wq", "wk", "wv"))}
# One attention layer on x to y, scores without a mask.
LAYER = """
    qm = MatMul(x, wq) km = MatMul(x, wk) vm = MatMul(x, wv)
    qr = Reshape(qm, heads) kr = Reshape(km, heads) vr = Reshape(vm, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(qr) k = Transpose<perm = [0, 2, 3, 1]>(kr)
    v = Transpose<perm = [0, 2, 1, 3]>(vr)
    s = MatMul(q, k) {scores}
    c = MatMul(p, v) t = Transpose<perm = [0, 2, 1, 3]>(c) j = Reshape(t, joined)
    y = Add(j, x)
"""
SOFTMAX = "p = Softmax<axis = -1>(s)"


def layer(
    tail: str,
    scores: str = SOFTMAX,
    shape: str = "B,S,8",
    *,
    out: str = "float z",
    more: str = "",
    selected: Mapping[str, Array] | None = None,
    **weights: Array,
) -> Graph:
    text = f"g (float[{shape}] x{more}) => ({out}) {{ {LAYER.format(scores=scores)} {tail} }}"
    constants = {"heads": HEADS, "joined": np.array([0, 0, 8]), "zero": np.array(0)}
    return parse(text, **constants, **WEIGHTS, **(selected or {}), **weights)


def scores_of(graph: Graph, length: int = 5) -> tuple[int, ...]:
    """The shape of the attention scores for three sequences."""
    import onnx

    from qcompile.ir.model_io.to_proto import serialize
    from qcompile.runtime.session import Session, with_outputs

    tapped = with_outputs(onnx.ModelProto.FromString(serialize(graph)), ["s"])
    feed = {t.name: np.ones((3, length, 8), np.float32) for t in graph.inputs if t.name == "x"}
    feed |= {"i": np.array([1, 4, 0]), "mask": np.zeros((3, 1, length, length), np.float32)}
    return Session(tapped.SerializeToString()).run(feed, ["s"])["s"].shape


def classifier(*, pre_norm: bool = False) -> Graph:
    """An encoder with a linear layer on the first position."""
    graph = encoder(pre_norm=pre_norm)
    (out,) = graph.outputs
    first = graph.constant("first", np.array(0, np.int64))
    cls = graph.add("Gather", [out, first], ["cls"], {"axis": 1}).outputs[0]
    weight = graph.constant("head", normal(int(out.shape[-1]), 3, seed=99))
    logits = graph.add("MatMul", [cls, weight], ["logits"]).outputs[0]
    cls.dtype = logits.dtype = np.dtype(np.float32)
    logits.shape = ["B", 3]
    graph.surgeon.outputs[:] = [logits]
    graph.sort()
    shape_inference.infer(graph)
    return graph


FEEDS = [
    {"ids": np.random.default_rng(0).integers(0, 64, np.shape(m)), "attention_mask": np.array(m)}
    for m in ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], [[1]], [[1, 1], [1, 0]])
]


def test_golden() -> None:
    graph = layer("z = Gather<axis = 1>(y, zero)")
    ctx = run_pass(graph, DropUnusedPositions())
    check(
        graph,
        """
        CHECK: %[[X:x/used]] = Gather(%x, @positions/used{{.*}}=[0]) {axis=1}
        CHECK: %qm = MatMul(%[[X]], @wq
        CHECK: %km = MatMul(%x, @wk
        CHECK: %vm = MatMul(%x, @wv
        CHECK: %y = Add(%j, %[[X]])
        CHECK: %z = Gather(%y, @z/position{{.*}}=0) {axis=1}
        """,
    )
    assert ctx.remarks[NOTE] == (
        "the outputs depend on 1 of all positions through 'z': 3 matrix multiplications run for no "
        "others"
    )


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_classifier_gives_the_same_answers(pre_norm: bool) -> None:
    graph = classifier(pre_norm=pre_norm)
    differential(graph, DropUnusedPositions(), atol=ATOL, feeds=FEEDS)
    assert [n.outputs[0].shape[1] for n in graph.nodes if n.outputs[0].name in ("u1", "z1")] == [
        1
    ] * 2


TAILS = {
    "slice": "z = Slice(y, one, two, one)",
    "last": "z = Slice(y, minus, end, one)",
    "last by index": "z = Gather<axis = 1>(y, last)",
    "two readers": "a = Gather<axis = 1>(y, zero) b = Slice(y, nil, one, one) c1 = Squeeze(b, one) "
    "z = Sub(a, c1)",
    "three positions": "z = Gather<axis = 1>(y, three)",
}
SELECTED = {
    "one": np.array([1]), "two": np.array([2]), "minus": np.array([-1]), "nil": np.array([0]),
    "end": np.array([2**63 - 1]), "last": np.array(-1), "three": np.array([[2, 0], [-1, 2]]),
}  # fmt: skip


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_positions_are_selected_in_many_ways(tail: str) -> None:
    graph = layer(tail, shape="3,9,8", selected=SELECTED)
    differential(graph, DropUnusedPositions(), atol=ATOL)
    assert scores_of(graph, 9)[2] == (4 if "three" in tail else 1)


def test_one_position_of_each_sample_is_selected() -> None:
    pairs = "b = Shape<start = 0, end = 1>(x) n = Squeeze(b) r = Range(zero, n, step)"
    pairs += " ru = Unsqueeze(r, minus) iu = Unsqueeze(i, minus) both = Concat<axis = 1>(ru, iu)"
    feeds = [{"x": normal(3, n, 8), "i": np.array([1, n - 1, 0])} for n in (2, 7)]
    for tail in (
        f"{pairs} z = GatherND(y, both)",
        "iu = Unsqueeze(i, minus) z = GatherND<batch_dims = 1>(y, iu)",
        "iu = Unsqueeze(i, inner) e = Expand(iu, wide) z = GatherElements<axis = 1>(y, e)",
    ):
        graph = layer(
            tail, more=", int64[B] i", step=np.array(1), minus=np.array([-1]),
            inner=np.array([1, 2]), wide=np.array([1, 1, 8]),
        )  # fmt: skip
        differential(graph, DropUnusedPositions(), atol=ATOL, feeds=feeds)
        assert scores_of(graph) == (3, 2, 1, 5)


def test_masks_and_biases_of_each_query_are_selected() -> None:
    triangle = np.triu(np.full((6, 6), -1e9, np.float32), 1)
    masked = f"sb = Add(s, triangle) sm = Add(sb, mask) {SOFTMAX.replace('(s)', '(sm)')}"
    more = ", float[3,1,6,6] mask, int64[3] i"
    for tail in ("z = Gather<axis = 1>(y, last)", "u = Unsqueeze(i, one) "
                 "z = GatherND<batch_dims = 1>(y, u)"):  # fmt: skip
        graph = layer(
            tail, masked, "3,6,8", more=more, triangle=triangle, last=np.array(-2),
            one=np.array([1]),
        )  # fmt: skip
        feed = {"x": normal(3, 6, 8), "mask": normal(3, 1, 6, 6), "i": np.array([5, 0, 3])}
        differential(graph, DropUnusedPositions(), atol=ATOL, feeds=[feed])
        assert scores_of(graph, 6) == (3, 2, 1, 6)


def test_a_shape_that_is_read_stays_that_of_all_positions() -> None:
    tail = "z = Gather<axis = 1>(y, zero) n = Shape(y) m = Shape<start = 1, end = 2>(qm)"
    graph = layer(tail, out="float z, int64[3] n, int64[1] m")
    differential(graph, DropUnusedPositions(), atol=ATOL)


def test_a_computed_target_shape_is_patched() -> None:
    text = """g (float[B,S,8] x) => (float z) {
        d = Shape(x) b = Gather(d, nil) n = Gather(d, one) m = MatMul(x, w)
        flat = Concat<axis = 0>(b, n, two, four) r = Reshape(m, flat)
        back = Concat<axis = 0>(b, n, eight) u = Reshape(r, back) z = Gather<axis = 1>(u, zero)
    }"""
    sizes = {"nil": [0], "one": [1], "two": [2], "four": [4], "eight": [8]}
    weights = {n: np.array(v) for n, v in sizes.items()}
    graph = parse(text, w=normal(8, 8), zero=np.array(0), **weights)
    differential(graph, DropUnusedPositions(), atol=ATOL)


def test_rows_of_batch_and_sequence_in_one_axis() -> None:
    text = """g (float[B,S,8] x) => (float z) {
        r = Reshape(x, rows) a = Relu(r) m = MatMul(a, w) n = Neg(a) t = Add(m, n)
        c = Softmax<axis = 0>(n) d = ReduceMax<axes = [0], keepdims = 0>(c)
        l = Shape(x) u = Reshape(t, l) f = Gather<axis = 1>(u, zero) z = Add(f, d)
    }"""
    graph = parse(text, w=normal(8, 8), rows=np.array([-1, 8]), zero=np.array(0))
    differential(graph, DropUnusedPositions(), atol=ATOL)
    (product,) = (n for n in graph.nodes if is_op(n, "MatMul"))
    assert product.inputs[0].name != "a"


def test_sequence_before_batch() -> None:
    text = """g (float[S,B,8] x) => (float z) {
        m = MatMul(x, w) n = LayerNormalization<axis = -1>(m, g, b) r = Relu(n)
        z = Gather<axis = 0>(r, zero)
    }"""
    graph = parse(text, w=normal(8, 8), g=normal(8), b=normal(8, seed=1), zero=np.array(0))
    differential(graph, DropUnusedPositions(), atol=ATOL)


def block(text: str, shape: str = "B,S,8", **weights: Array) -> Graph:
    text = f"g (float[{shape}] x) => (float z) {{ m = MatMul(x, w) {text} }}"
    return parse(text, w=normal(8, 8), zero=np.array(0), **weights)


FIRST = "z = Gather<axis = 1>(n, zero)"


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            layer("z = Gather<axis = 1>(y, zero)", out="float z, float y"),
            "output 'y' has all positions (--outputs NAME keeps others)",
        ),
        (
            block(f"n = Softmax<axis = 1>(m) {FIRST}"),
            "Softmax computes all positions: it normalizes over the positions",
        ),
        (
            block(f"n = CumSum(m, axis) {FIRST}", axis=np.array(1)),
            "CumSum computes all positions: it may combine positions",
        ),
        (
            block(f"n = InstanceNormalization(m, s, s) {FIRST}", "B,8,8", s=np.ones(8, np.float32)),
            "InstanceNormalization computes all positions: it may combine positions",
        ),
        (
            block(f"n = Slice(m, one, end, one) {FIRST}", one=np.array([1]), end=np.array([99])),
            "Slice computes all positions: it selects positions itself",
        ),
        (
            block("n = Relu(m) a = ReduceSum<keepdims = 0>(n, one) b = Gather<axis = 1>(n, zero) "
                  "z = Add(a, b)", one=np.array([1])),
            "ReduceSum 'ReduceSum:a' reads all of 'n'",
        ),
        (
            block("z = Slice(m, zeros, two, one)", zeros=np.array([0]), two=np.array([2]),
                  one=np.array([1])),
            "how many positions it selects depends on the length",
        ),
        (parse("""<ir_version: 8, opset_import: ["": 12]> g (float[B,S,8] x, float[8,8] w,
               int64 i) => (float[B,8] z) { m = MatMul(x, w) z = Gather<axis = 1>(m, i) }"""),
         "opset 12, needs 13"),
    ],
)  # fmt: skip
def test_what_needs_all_positions_is_refused(graph: Graph, reason: str) -> None:
    assert_refused(graph, DropUnusedPositions(), reason)


@pytest.mark.parametrize(
    "graph",
    [
        lambda: block("z = Relu(m)"),
        lambda: block("a = Gather<axis = 1>(m, zero) b = Gather<axis = 1>(m, one) z = Add(a, b)",
                      one=np.array(1)),
        lambda: parse("g (float[B,S,8] x) => (float z) { r = Relu(x) z = Gather<axis = 1>(r, o) }",
                      o=np.array(0)),
    ],
    ids=["nothing selected", "different positions", "no matrix multiplication"],
)  # fmt: skip
def test_what_would_save_nothing_is_left_alone(graph: Callable[[], Graph]) -> None:
    made = graph()
    before = [n.op for n in made.nodes]
    run_pass(made, DropUnusedPositions())
    assert [n.op for n in made.nodes] == before


def test_a_subgraph_that_reads_a_tensor_needs_all_of_it() -> None:
    text = """g (float[B,S,8] x, bool flag) => (float z) {
        m = MatMul(x, w) n = Relu(m) f = Gather<axis = 1>(n, zero)
        a = If (flag) <
            then_branch = t () => (float b) { b = ReduceSum<keepdims = 0>(n, one) },
            else_branch = e () => (float b) { b = Gather<axis = 1>(n, zero) }
        >
        z = Add(f, a)
    }"""
    graph = parse(text, w=normal(8, 8), zero=np.array(0), one=np.array([1]))
    assert_refused(graph, DropUnusedPositions(), "a subgraph reads 'n'")


def test_padding_is_still_removed() -> None:
    """The first position is read from the packed rows; the layer before works on real tokens."""
    graph = classifier()
    expected = outputs(graph, FEEDS[0])
    run_pass(graph, DropUnusedPositions(), RemovePadding())
    check(
        graph,
        """
        CHECK: %z0/packed = LayerNormalization
        CHECK: %[[ROWS:[^ ]+]] = Gather(%padding/grid, @positions/used{{.*}}) {axis=1}
        CHECK: %[[FIRST:[^ ]+]] = Gather(%z0/packed, %[[ROWS]]) {axis=0}
        CHECK: %qm1 = MatMul(%[[FIRST]], @wq1
        CHECK: %km1 = MatMul(%z0/packed, @wk1
        """,
    )
    assert "z0" not in graph.tensors()
    assert_equivalent(expected, outputs(graph, FEEDS[0]), atol=ATOL)


@pytest.mark.parametrize("kind", ["cls", "lasttoken"])
def test_positions_may_depend_on_the_shape_of_what_is_narrowed(kind: PoolingKind) -> None:
    """Pooling expands the mask to the shape of the states, and picks a position by it."""
    graph = encoder()
    add_pooling(graph, kind)
    shape_inference.infer(graph)
    differential(graph, DropUnusedPositions(), atol=ATOL, feeds=FEEDS)
    assert any(n.op == "GatherND" and n.outputs[0].name.startswith("z0") for n in graph.nodes)


def test_positions_by_a_size_that_no_input_has_are_refused() -> None:
    text = """g (float[B,S,8] x) => (float z) {
        twice = Concat<axis = 0>(x, x) m = MatMul(twice, w) r = Relu(m)
        n = Shape<start = 0, end = 1>(r) i = Sub(n, n) z = Gather<axis = 1>(r, i)
    }"""
    reason = "the shape of 'r' is read, and no input has its sizes"
    assert_refused(parse(text, w=normal(8, 8)), DropUnusedPositions(), reason)
