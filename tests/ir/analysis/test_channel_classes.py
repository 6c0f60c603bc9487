"""Which axes share their order, which may have one for each head, and what pins them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.analysis.channel_classes import ChannelClass, Member, channel_classes
from qcompile.ir.printer import dump
from qcompile.passes.transform.permute_channels import permute
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_equivalent, context, normal, outputs, parse
from qcompile.runtime.session import evaluate
from tests.passes.corpus import bert_layer

F32 = np.float32


def classes(graph: Graph) -> list[ChannelClass]:
    return channel_classes(graph, evaluate)


def text(graph: Graph) -> str:
    """One class a line: ``2x3 w[-1] b[-1] | y[-1] pinned by ...``: constants, then outputs."""
    lines = []
    for item in classes(graph):
        size = "x".join(str(n) for n in (*item.heads, item.size))
        constants = sorted(f"{m.tensor}[{m.axis}]" for m in item.constants)
        ends = [f"| {m.tensor}[{m.axis}]" for m in item.outputs]
        pinned = [f"pinned: {item.pinned}"] if item.pinned else []
        lines.append(" ".join([size, *constants, *ends, *pinned]))
    return "\n".join(sorted(lines))


def pins(graph: Graph) -> list[str]:
    return [c.pinned or "" for c in classes(graph)]


def any_order_will_do(graph: Graph) -> None:
    """Put every free class into a random order, for each head another, and compare answers.

    Sums of up to ten products, below 64, are taken in another order, three in a row: each rounds
    by at most 2^-24 of a partial sum.
    """
    rng = np.random.default_rng(0)
    free = [c for c in classes(graph) if not c.pinned]
    orders = [np.argsort(rng.random((*c.heads, c.size)), axis=-1) for c in free]
    before, after = answers(graph, list(zip(free, orders, strict=True)))
    assert_equivalent(before, after, atol=3 * 10 * 2.0**-24 * 64)


def answers(
    graph: Graph, chosen: list[tuple[ChannelClass, Array]]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the graph computes before and after classes are put into these orders."""
    rng = np.random.default_rng(1)
    sizes = {t.name: (2, 3)[: len(t.shape)] for t in graph.inputs}
    feed = {t.name: rng.integers(0, 5, sizes[t.name]).astype(t.dtype) for t in graph.inputs}
    before = outputs(graph, feed)
    permute(graph, context(), chosen)
    return before, outputs(graph, feed)


def test_a_transformer_layer() -> None:
    assert text(bert_layer()) == "\n".join(
        [
            "10 bi[-1] wd[-2] wi[-1]",
            "2x3 bq[-1] wk[-1] wq[-1]",
            "2x3 bv[-1] wo[-2] wv[-1]",
            "4 wp[-1] | pooled[-1]",
            "6 b0[-1] b1[-1] b2[-1] bd[-1] g0[-1] g1[-1] g2[-1] table[-1] wd[-1] wi[-2] wk[-2]"
            " wo[-1] words[-1] wp[-2] wq[-2] wv[-2] | y[-1]",
        ]
    )


def test_members_know_where_heads_and_channels_lie() -> None:
    values = next(c for c in classes(bert_layer()) if any(m.tensor == "bv" for m in c.constants))
    found = {m.tensor: m for m in (*values.constants, *values.activations)}
    assert found["wo"] == Member("wo", -2, (2, 3), 1, (0,))
    assert found["cr"] == Member("cr", -1, (2, 3), 1, (0,))
    assert found["v"] == Member("v", -1, (3,), 0, ())  # the head is on another axis
    assert values.heads == (2,) and not values.reaches_output


def test_the_graph_is_left_alone() -> None:
    graph = bert_layer()
    before = dump(graph)
    classes(graph)
    assert dump(graph) == before


def test_rows_and_columns_of_one_matrix_in_one_class() -> None:
    graph = parse(
        """g (int64[N] ids) => (float[N,4] y) {
            e = Gather(t, ids) m = MatMul(e, w) y = Add(m, e) }""",
        t=normal(9, 4),
        w=normal(4, 4),
    )
    assert text(graph) == "4 t[-1] w[-1] w[-2] | y[-1]"
    any_order_will_do(graph)


def test_tied_embeddings_through_a_transpose() -> None:
    """Columns are channels; rows are looked up one by one, so logits stay where they are."""
    graph = parse(
        """g (int64[N] ids) => (float[N,9] y) {
            e = Gather(t, ids) m = MatMul(e, w) k = Transpose(t) y = MatMul(m, k) }""",
        t=normal(9, 4),
        w=normal(4, 4),
    )
    assert text(graph) == "\n".join(
        ["4 t[-1] w[-1] w[-2]", "9 t[-2] | y[-1] pinned: Gather 'Gather:e' looks its entries up"]
    )


def test_a_vector_that_does_not_vary_ties_nothing() -> None:
    """Exporters share one vector of zeros between all biases."""
    body = "a = MatMul(e, w) b = Add(a, z) c = Relu(b) d = MatMul(c, v) y = Add(d, z)"
    source = f"g (int64[N] ids) => (float[N,4] y) {{ e = Gather(e0, ids) {body} }}"
    weights = {"e0": normal(9, 4), "w": normal(4, 4), "v": normal(4, 4)}
    assert text(parse(source, **weights, z=np.zeros(4, F32))).splitlines() == [
        "4 e0[-1] w[-2]",
        "4 v[-1] | y[-1]",
        "4 v[-2] w[-1]",
    ]
    assert text(parse(source, **weights, z=normal(4))).splitlines() == [
        "4 e0[-1] w[-2]",
        "4 v[-1] v[-2] w[-1] z[-1] | y[-1]",
    ]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Gemm<transB = 1>(e, w, b)", "4 t[-1] w[-1]\n4 b[-1] w[-2] | y[-1]"),
        ("f = Transpose(e) y = Gemm<transA = 1>(f, w, b)", "4 t[-1] w[-2]\n4 b[-1] w[-1] | y[-1]"),
        ("k = Transpose(e) m = MatMul(w, k) y = Transpose(m)", "4 t[-1] w[-1]\n4 w[-2] | y[-1]"),
        ("m = MatMul(e, w) r = ReduceMean<axes = [-1]>(m) y = Sub(m, r)",
         "4 t[-1] w[-2]\n4 w[-1] | y[-1]"),
        ("m = MatMul(e, w) r = ReduceSum<keepdims = 0>(m, last) u = Unsqueeze(r, last)"
         " y = Add(m, u)", "4 t[-1] w[-2]\n4 w[-1] | y[-1]"),
        ("m = MatMul(e, w) s = Squeeze(one) f = Flatten(m) y = Mul(f, s)",
         "4 t[-1] w[-2]\n4 w[-1] | y[-1]"),
        ("m = MatMul(e, w) d = Dropout(m, half) y = Identity(d)", "4 t[-1] w[-2]\n4 w[-1] | y[-1]"),
        ("m = MatMul(e, w) s = Softmax(m) y = MatMul(s, w)", "4 t[-1] w[-1] w[-2] | y[-1]"),
        ("m = MatMul(e, w) z = Expand(one, wide) y = Mul(m, z)", "4 t[-1] w[-2]\n4 w[-1] | y[-1]"),
        ("m = MatMul(e, w) n = Shape(m) y = Reshape(m, n)", "4 t[-1] w[-2]\n4 w[-1] | y[-1]"),
        ("m = MatMul(e, w) n = Clip(m, , half) y = Where(yes, n, b)",
         "4 t[-1] w[-2]\n4 b[-1] w[-1] | y[-1]"),
        ("m = MatMul(e, w) y = Reshape(m, rest)", "4 t[-1] w[-2]\n4 w[-1] | y[-1]"),
    ],
)  # fmt: skip
def test_operators_that_keep_channels_apart(body: str, found: str) -> None:
    assert sorted(text(small(body)).splitlines()) == sorted(found.splitlines())
    any_order_will_do(small(body))


def small(body: str, ends: str = "float[N,4] y") -> Graph:
    """A table, a matrix and a vector of width 4, and constants of all kinds."""
    return parse(
        f"""g (int64[N] ids, int64 i, bool c) => ({ends}) {{
            e = Gather(t, ids) {body} }}""",
        t=normal(9, 4),
        w=normal(4, 4),
        b=normal(4),
        last=np.array([-1]),
        wide=np.array([1, 4]),
        rest=np.array([0, -1]),
        one=np.array([3], F32),
        half=np.array(0.5, F32),
        yes=np.array(True),
        zero=np.array([0]),
        two=np.array([2]),
        cubes=np.array([-1, 2, 2]),
    )


BRANCHES = """y = If (c) <
    then_branch = yes_ () => (float[N,4] p) { p = Neg(m) },
    else_branch = no () => (float[N,4] q) { q = Abs(m) }
>"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("m = MatMul(e, w) y = Slice(m, zero, two, last)", "Slice 'Slice:y' splits it"),
        ("m = MatMul(e, w) y = Slice(m, wide, wide)", "Slice 'Slice:y' splits it"),
        ("m = MatMul(e, w) y, z = Split<axis = -1>(m)", "Split 'Split:y' splits it"),
        ("m = MatMul(e, w) y = Concat<axis = 1>(m, m)", "Concat 'Concat:y' concatenates it"),
        ("m = MatMul(e, w) y = Gather<axis = 1>(m, zero)",
         "Gather 'Gather:y' looks its entries up"),
        ("m = MatMul(e, w) y = CumSum(m, last)",
         "CumSum 'CumSum:y' may mix its entries"),
        ("m = MatMul(e, w) a = ArgMax<axis = -1>(m) y = Cast<to = 1>(a)",
         "ArgMax 'ArgMax:a' may mix its entries"),
        (f"m = MatMul(e, w) {BRANCHES}", "If 'If:y' may mix its entries"),
        ("m = MatMul(e, w) a = NonZero(m) r = Cast<to = 1>(a) s = Transpose(r) f = MatMul(m, w)"
         " y = Add(s, half)", "NonZero 'NonZero:a' may mix its entries"),
        ("m = MatMul(e, w) y = ReduceSum(m, ids)", "ReduceSum 'ReduceSum:y' computes its axes"),
        ("m = MatMul(e, w) y = Reshape(m, ids)",
         "Reshape 'Reshape:y' makes a tensor of unknown shape"),
        ("m = MatMul(e, w) k = Reshape(m, cubes) l = Transpose<perm = [0, 2, 1]>(k)"
         " n = Reshape(l, rest) y = Add(m, n)", "'w' has it twice in one axis"),
    ],
)  # fmt: skip
def test_what_pins_a_class(body: str, reason: str) -> None:
    graph = small(body, "float[N,4] y" if "Cast<to = 1>(a)" not in body else "float y")
    found = pins(graph)
    assert any(p.startswith(reason) for p in found), found


def test_splits_that_do_not_fit_pin_what_they_split() -> None:
    graph = heads_of(
        "k = Transpose<perm = [0, 1, 3, 2]>(r) f = Reshape(k, join) y = Add(f, m)", "float[B,S,6] y"
    )
    assert pins(graph)[-1] == "Add 'Add:y' splits it in a way that does not fit another"


def test_a_graph_input_pins() -> None:
    graph = parse("g (float[B,S,4] x) => (float[B,S,6] y) { y = MatMul(x, w) }", w=normal(4, 6))
    assert text(graph) == "\n".join(["4 w[-2] pinned: graph input 'x' has it", "6 w[-1] | y[-1]"])


def test_outputs_to_which_no_order_can_be_given_back() -> None:
    graph = small("m = MatMul(e, w) d, y = Dropout(m, half)", "bool[N,4] y")
    assert pins(graph)[-1] == "graph output 'y' is not the first result of a node"
    graph = parse(
        """g (int64[B,S] ids) => (float[B,F] y) {
            e = Gather(t, ids) m = MatMul(e, w) y = Reshape(m, flat) }""",
        t=normal(9, 4),
        w=normal(4, 6),
        flat=np.array([0, -1]),
    )
    assert pins(graph)[-1] == "graph output 'y' has it in an axis of varying size"


def heads_of(body: str, ends: str) -> Graph:
    """A linear of two heads of 3, ``r`` before and ``q`` after its transposition."""
    return parse(
        f"""g (int64[B,S] ids) => ({ends}) {{
            e = Gather(t, ids) m = MatMul(e, w) r = Reshape(m, split)
            q = Transpose<perm = [0, 2, 1, 3]>(r) {body} }}""",
        t=normal(9, 4),
        w=normal(4, 6),
        v=normal(3),
        o=normal(6, 6),
        split=np.array([0, 0, 2, 3]),
        join=np.array([0, 0, 6]),
    )


MIXED = (
    "s = Softmax<axis = 2>(r) f = Reshape(s, join) y = MatMul(f, o)",
    "s = ReduceMean<axes = [2]>(r) d = Sub(r, s) f = Reshape(d, join) y = MatMul(f, o)",
    # each head meets every other
    "k = Transpose<perm = [0, 1, 3, 2]>(r) p = MatMul(r, k) s = Softmax(p) c = MatMul(s, r)"
    " f = Reshape(c, join) y = MatMul(f, o)",
)


@pytest.mark.parametrize(
    ("body", "ends", "found"),
    [
        # what heads share must have one order, and so must what leaves with the head elsewhere
        ("s = Relu(r) f = Reshape(s, join) y = MatMul(f, o)", "float[B,S,6] y", (2,)),
        ("s = Mul(r, v) f = Reshape(s, join) y = MatMul(f, o)", "float[B,S,6] y", ()),
        ("y = Relu(q)", "float[B,2,S,3] y", ()),
        ("f = Reshape(r, join) y = Relu(f)", "float[B,S,6] y", (2,)),
        # what is summed over channels alone, over both, and what mixes heads
        ("s = Softmax<axis = -1>(r) f = Reshape(s, join) y = MatMul(f, o)", "float[B,S,6] y", (2,)),
        ("s = Softmax<axis = -1>(m) y = MatMul(s, o)", "float[B,S,6] y", (2,)),
        *((body, "float[B,S,6] y", ()) for body in MIXED),
    ],
)  # fmt: skip
def test_where_heads_may_differ(body: str, ends: str, found: tuple[int, ...]) -> None:
    graph = heads_of(body, ends)
    columns = next(c for c in classes(graph) if any(m.tensor == "m" for m in c.activations))
    assert (columns.heads, columns.size, columns.pinned) == (found, 3, None)
    any_order_will_do(graph)


@pytest.mark.parametrize("body", MIXED)
def test_orders_by_head_would_show_where_heads_are_mixed(body: str) -> None:
    """Without this the rule might forbid what does no harm."""
    graph = heads_of(body, "float[B,S,6] y")
    columns = next(c for c in classes(graph) if any(m.tensor == "m" for m in c.activations))
    by_head = tuple(replace(m, heads=(0,)) for m in columns.constants)
    forced = replace(columns, heads=(2,), constants=by_head, activations=())
    before, after = answers(graph, [(forced, np.array([[0, 1, 2], [1, 2, 0]]))])
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_equivalent(before, after, atol=1e-3)


def test_fused_attention() -> None:
    source = """g (int64[B,S] ids) => (float[B,S,5] y) {
            e = Gather(t, ids)
            qm = MatMul(e, w) qr = Reshape(qm, split) q = Transpose<perm = [0, 2, 1, 3]>(qr)
            km = MatMul(e, u) kr = Reshape(km, split) k = Transpose<perm = [0, 2, 1, 3]>(kr)
            vm = MatMul(e, v) vr = Reshape(vm, other) x = Transpose<perm = [0, 2, 1, 3]>(vr)
            a = Attention(q, k, x)
            b = Transpose<perm = [0, 2, 1, 3]>(a) c = Reshape(b, join) y = MatMul(c, o)
        }"""
    weights: dict[str, Array] = {n: normal(4, 6) for n in "wu"}
    weights |= {"t": normal(9, 4), "v": normal(4, 4), "o": normal(4, 5)}
    weights |= {"split": np.array([0, 0, 2, 3]), "other": np.array([0, 0, 2, 2])}
    weights["join"] = np.array([0, 0, 4])
    graph = parse(source, 23, **weights)
    assert text(graph).splitlines() == [
        "2x2 o[-2] v[-1]",
        "2x3 u[-1] w[-1]",
        "4 t[-1] u[-2] v[-2] w[-2]",
        "5 o[-1] | y[-1]",
    ]
    any_order_will_do(graph)
    direct = source.replace(
        "Attention(q, k, x)", "Attention<q_num_heads = 1, kv_num_heads = 1>(qm, km, vm)"
    )
    direct = direct.replace("b = Transpose<perm = [0, 2, 1, 3]>(a)", "b = Identity(a)")
    graph = parse(direct, 23, **weights)
    assert any(p.startswith("Attention 'Attention:a' is supported only") for p in pins(graph))


def test_contrib_operators_hide_no_shapes() -> None:
    """Inference stops at them: shapes computed behind them would be unknown."""
    graph = parse(
        """g (int64[B,S] ids) => (float[B,S,6] y) {
            e = Gather(t, ids) m = MatMul(e, w) f = com.microsoft.BiasGelu(m, b)
            n = Shape(f) a = Abs(n) y = Reshape(f, a)
        }""",
        t=normal(9, 4),
        w=normal(4, 6),
        b=normal(6),
    )
    assert text(graph).splitlines() == ["4 t[-1] w[-2]", "6 b[-1] w[-1] | y[-1]"]


def test_the_order_of_an_axis() -> None:
    """Two heads of three channels, each channel twice: a factor minor to them."""
    member = Member("w", -1, (2, 3, 2), 1, (0,))
    order = np.array([[2, 0, 1], [0, 1, 2]])
    assert member.spread(order).tolist() == [4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    values = np.arange(12.0)
    assert member.largest(values).tolist() == [[1, 3, 5], [7, 9, 11]]
    moved = member.largest(values[member.spread(order)])
    assert moved.tolist() == np.take_along_axis(member.largest(values), order, -1).tolist()


def test_heads_that_stand_in_another_order_on_an_axis() -> None:
    member = Member("w", 0, (3, 2, 4), 2, (1, 0))  # heads (2, 3), written the other way round
    order = np.argsort(normal(2, 3, 4), axis=-1)
    spread = member.spread(order).reshape(3, 2, 4)
    for i in range(2):
        for j in range(3):
            assert (spread[j, i] == (j * 2 + i) * 4 + order[i, j]).all()


def test_one_order_for_all_heads() -> None:
    values = next(c for c in classes(bert_layer()) if c.heads)
    alike = values.alike()
    assert (alike.heads, alike.size) == ((), 3)
    order = alike.constants[0].spread(np.array([2, 0, 1]))
    assert order.tolist() == [2, 0, 1, 5, 3, 4]
