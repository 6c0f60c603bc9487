"""Channels are sorted by width, and the model and all that is known of it stay as true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.analysis.channel_classes import ChannelClass, channel_classes
from qcompile.ir.model_io.to_proto import serialize
from qcompile.ir.printer import dump
from qcompile.passes.transform.permute_channels import PermuteChannels, permute
from qcompile.planning import Context, Decision, Use
from qcompile.quant import Array, ChannelStats, QSpec, Range
from qcompile.rewriting.testing import (
    assert_equivalent,
    assert_refused,
    check,
    context,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)
from qcompile.runtime.session import Session, SessionOptions, evaluate, with_outputs
from tests.passes.corpus import bert_layer

F32 = np.float32
# Sums of up to K = 10 products are taken in another order: each of their roundings is at most
# 2^-24 of a partial sum, all of which are below 64 in these feeds; four such sums in a row.
ATOL = 4 * 10 * 2.0**-24 * 64


def feed(batch: int, length: int) -> dict[str, Array]:
    """Tokens of a vocabulary of nine; positions of five."""
    rng = np.random.default_rng(batch)
    mask = np.ones((batch, length), np.int64)
    mask[0, 3:] = 0
    ids = rng.integers(0, 9, (batch, length))
    return {"ids": ids, "places": np.arange(length)[None] % 5 + 0 * ids, "mask": mask}


def feeds(graph: Graph) -> list[dict[str, Array]]:
    """A batch of one token, and ones of odd sizes with padding."""
    names = [t.name for t in graph.inputs]
    return [{n: feed(*dims)[n] for n in names} for dims in ((1, 1), (2, 5), (3, 4))]


def mlp() -> Graph:
    """A table, a hidden layer, a residual sum, and an output."""
    return parse(
        """g (int64[B,S] ids) => (float[B,S,4] y) {
            e = Gather(t, ids)
            m = MatMul(e, w)
            a = Add(m, b)
            r = Relu(a)
            n = MatMul(r, v)
            y = Add(n, e)
        }""",
        t=normal(9, 4),
        w=normal(4, 3),
        b=normal(3),
        v=normal(3, 4),
    )


def tied() -> Graph:
    """The table of a lookup, transposed, makes the logits."""
    return parse(
        """g (int64[B,S] ids) => (float[B,S,9] y) {
            e = Gather(t, ids)
            m = MatMul(e, w)
            n = LayerNormalization(m, g)
            k = Transpose(t)
            y = MatMul(n, k)
        }""",
        t=normal(9, 4),
        w=normal(4, 4),
        g=normal(4),
    )


def shared() -> Graph:
    """Two layers with one weight and one bias, as ALBERT has."""
    return parse(
        """g (int64[B,S] ids) => (float[B,S,4] y) {
            e = Gather(t, ids)
            m0 = MatMul(e, w) a0 = Add(m0, b) r0 = Relu(a0)
            m1 = MatMul(r0, w) a1 = Add(m1, b) y = Relu(a1)
        }""",
        t=normal(9, 4),
        w=normal(4, 4),
        b=normal(4),
    )


GRAPHS: dict[str, Callable[[], Graph]] = {
    "mlp": mlp,
    "encoder": bert_layer,
    "tied": tied,
    "shared": shared,
}


def values(graph: Graph, names: list[str]) -> dict[str, Array]:
    """What tensors hold on all feeds, (rows, last axis)."""
    tapped = with_outputs(onnx.ModelProto.FromString(serialize(graph)), names)
    session = Session(tapped.SerializeToString(), SessionOptions(threads=1, optimize=False))
    seen = [session.run(f) for f in feeds(graph)]
    return {n: np.concatenate([s[n].reshape(-1, s[n].shape[-1]) for s in seen]) for n in names}


def watched(graph: Graph, *names: str) -> Context:
    """A context with statistics of these tensors."""
    ctx = context()
    for name, rows in values(graph, list(names)).items():
        ctx.channels[name] = ChannelStats(rows.min(0), rows.max(0), rows)
    return ctx


def stats(*width: float) -> ChannelStats:
    """Statistics of channels of these widths."""
    high = np.array(width, F32)
    return ChannelStats(-high / 2, high, high[None] / 3)


def test_golden() -> None:
    graph = mlp()
    ctx = context()
    ctx.channels = {"e": stats(1, 4, 2, 3), "r": stats(1, 3, 2)}
    differential(graph, PermuteChannels(), atol=ATOL, feeds=feeds(graph), ctx=ctx)
    check(
        graph,
        """
        CHECK: %e = Gather(@t/permuted:f32[9,4]{{#[0-9a-f]+}}, %ids)
        CHECK-NEXT: %m = MatMul(%e, @w/permuted:f32[4,3]
        CHECK-NEXT: %a = Add(%m, @b/permuted:f32[3]
        CHECK-NEXT: %r = Relu(%a)
        CHECK-NEXT: %n = MatMul(%r, @v/permuted:f32[3,4]
        CHECK-NEXT: %y/permuted = Add(%n, %e)
        CHECK-NEXT: %y = Gather(%y/permuted, @y/order:i64[4]=[3, 0, 2, 1]) {axis=-1}
        CHECK-NOT: =
        """,
    )
    rows, columns = [1, 3, 2, 0], [1, 2, 0]
    found = {n: array(t) for n, t in graph.constants().items()}
    assert np.array_equal(found["t/permuted"], normal(9, 4)[:, rows])
    assert np.array_equal(found["w/permuted"], normal(4, 3)[rows][:, columns])
    assert np.array_equal(found["b/permuted"], normal(3)[columns])
    assert np.array_equal(found["v/permuted"], normal(3, 4)[columns][:, rows])
    assert ctx.channels["e"].width.tolist() == [4, 3, 2, 1]
    assert ctx.skips == []


def test_widths_of_all_members_count() -> None:
    """Of the residual stream: x after one normalization, h after another."""
    graph, ctx = bert_layer(), context()
    ctx.channels = {"x": stats(1, 2, 3, 4, 5, 6), "h": stats(9, 0, 0, 0, 0, 7)}
    run_pass(graph, PermuteChannels(), ctx=ctx)
    order = [0, 5, 4, 3, 2, 1]
    assert ctx.channels["x"].width.tolist() == [1, 6, 5, 4, 3, 2]
    assert ctx.channels["h"].width.tolist() == [9, 7, 0, 0, 0, 0]
    gamma = array(graph.constants()["g1/permuted"])
    assert np.array_equal(gamma, array(bert_layer().constants()["g1"])[order])


def test_a_transformer_layer_and_what_was_seen_of_it_stays_true() -> None:
    graph = bert_layer()
    names = ["x", "cr", "h", "act", "y"]
    ctx = watched(graph, *names)
    ctx.plan.decide(Decision("y", "activation", QSpec("uint8", False), "", (Use("Gather:cls", 0),)))
    differential(graph, PermuteChannels(), atol=ATOL, feeds=feeds(graph), ctx=ctx)
    moved = ["x", "cr", "h", "act", "y/permuted"]
    for name, rows in values(graph, [*moved, "y"]).items():
        np.testing.assert_allclose(ctx.channels[name].rows, rows, atol=ATOL)
        np.testing.assert_allclose(ctx.channels[name].hi, rows.max(0), atol=ATOL)
    assert (np.diff(ctx.channels["act"].width) <= 0).all()
    assert (np.diff(ctx.channels["cr"].width.reshape(2, 3), axis=-1) <= 0).all()
    assert [d.tensor for d in ctx.plan.quantized()] == ["y/permuted"]
    assert graph.find("Gather:cls").inputs[0].name == "y/permuted"
    check(graph, "CHECK: %y = Gather(%y/permuted, @y/order:i64[6]={{.*}}) {axis=-1}")


def test_channels_move_within_their_heads() -> None:
    graph, ctx = bert_layer(), context()
    ctx.channels = {"cr": stats(1, 2, 3, 5, 6, 4)}
    differential(graph, PermuteChannels(), atol=ATOL, feeds=feeds(graph), ctx=ctx)
    order = [2, 1, 0, 4, 3, 5]
    found, old = graph.constants(), bert_layer().constants()
    assert np.array_equal(array(found["wv/permuted"]), array(old["wv"])[:, order])
    assert np.array_equal(array(found["wo/permuted"]), array(old["wo"])[order])
    assert {"wq", "wk", "bq"} <= found.keys()  # queries and keys are a class of their own


def test_statistics_without_heads_ask_for_one_order_for_all_heads() -> None:
    """``q`` is [batch, heads, tokens, channels]: an order for each head would leave it untrue."""
    graph = bert_layer()
    ctx = watched(graph, "qb", "q")
    order = np.argsort(-ctx.channels["qb"].width.reshape(2, 3).max(0), kind="stable")
    assert order.tolist() != [0, 1, 2]
    differential(graph, PermuteChannels(), atol=ATOL, feeds=feeds(graph), ctx=ctx)
    whole = [*order, *(3 + order)]
    assert np.array_equal(
        array(graph.constants()["wk/permuted"]), array(bert_layer().constants()["wk"])[:, whole]
    )
    for name, rows in values(graph, ["qb", "q"]).items():
        np.testing.assert_allclose(ctx.channels[name].rows, rows, atol=ATOL)


def test_ranges_by_channel_follow() -> None:
    graph, ctx = mlp(), context()
    ctx.channels = {"e": stats(1, 4, 2, 3)}
    ctx.ranges.set("y", Range(np.zeros(4), np.arange(4), -1))
    ctx.ranges.set("n", Range(np.zeros(4), np.arange(4), 2))  # counted from the front
    ctx.ranges.set("m", Range(np.zeros(3), np.arange(3), -1))  # of another class
    ctx.ranges.set("e", Range(np.array(-1), np.array(1)))  # one for the tensor
    run_pass(graph, PermuteChannels(), ctx=ctx)
    found = {n: s.hi.tolist() for n, s in ctx.ranges.found.items()}
    assert found == {
        "y": [0, 1, 2, 3],
        "y/permuted": [1, 3, 2, 0],
        "n": [1, 3, 2, 0],
        "m": [0, 1, 2],
        "e": 1,
    }


def test_the_plan_follows_constants() -> None:
    graph, ctx = mlp(), context()
    ctx.channels = {"r": stats(1, 2, 3)}
    uses = (Use("MatMul:m", 1),)
    ctx.plan.decide(Decision("w", "weight", QSpec("int8", True), "because", uses))
    ctx.plan.decide(Decision("r", "activation", None, "because", (Use("MatMul:n", 0),)))
    run_pass(graph, PermuteChannels(), ctx=ctx)  # the verifier looks at planned uses
    assert [(d.tensor, d.uses) for d in ctx.plan.decisions] == [
        ("w/permuted", uses),
        ("r", (Use("MatMul:n", 0),)),
    ]


def test_a_shared_constant_stays_shared() -> None:
    graph = shared()
    ctx = watched(graph, "e", "r0")
    differential(graph, PermuteChannels(), atol=ATOL, feeds=feeds(graph), ctx=ctx)
    first, second = (graph.find(n).inputs[1] for n in ("MatMul:m0", "MatMul:m1"))
    assert first is second and first.name == "w/permuted"


def test_tied_embeddings() -> None:
    graph = tied()
    ctx = watched(graph, "e", "n")
    differential(graph, PermuteChannels(), atol=ATOL, feeds=feeds(graph), ctx=ctx)
    check(
        graph,
        """
        CHECK-DAG: %e = Gather(@t/permuted:f32[9,4][[HASH:#[0-9a-f]+]], %ids)
        CHECK-DAG: %k = Transpose(@t/permuted:f32[9,4][[HASH]])
        CHECK: %y = MatMul(%n, %k)
        CHECK-NOT: order
        """,
    )
    assert [s.reason for s in ctx.skips] == ["Gather 'Gather:e' looks its entries up"]


def test_an_output_of_two_axes() -> None:
    """Both axes of a table of products get their order back."""
    graph = parse(
        """g (int64[B,S] ids) => (float[B,4,3] y) {
            e = Gather(t, ids) m = MatMul(e, w) k = Transpose<perm = [0, 2, 1]>(e)
            y = MatMul(k, m)
        }""",
        t=normal(9, 4),
        w=normal(4, 3),
    )
    ctx = context()
    ctx.channels = {"e": stats(1, 2, 3, 4), "m": stats(1, 2, 3)}
    differential(graph, PermuteChannels(), atol=ATOL, feeds=feeds(graph), ctx=ctx)
    check(
        graph,
        """
        CHECK: %y/permuted = MatMul(%k, %m)
        CHECK-NEXT: %y/restored = Gather(%y/permuted, {{.*}}) {axis=-2}
        CHECK-NEXT: %y = Gather(%y/restored, {{.*}}) {axis=-1}
        """,
    )


def test_what_is_sorted_already_is_no_refusal() -> None:
    graph, ctx = mlp(), context()
    ctx.channels = {"e": stats(4, 3, 2, 2), "r": stats(3, 2, 1)}
    before = dump(graph)
    assert run_pass(graph, PermuteChannels(), ctx=ctx).skips == []
    assert dump(graph) == before


def test_asks_for_what_is_quantized_and_tells_heads_apart() -> None:
    """The last axis of scores are tokens, and of ``q`` and ``v`` channels without their heads."""
    graph, ctx = bert_layer(), context()
    for name in ("x", "q", "probs", "v", "cr", "act"):
        use = (Use(graph.consumers(graph.tensors()[name])[0].name, 0),)
        ctx.plan.decide(Decision(name, "activation", QSpec("uint8", False), "", use))
    ctx.plan.decide(Decision("h", "activation", None, "stays float", (Use("MatMul:im", 0),)))
    assert sorted(PermuteChannels().wants(graph, ctx)) == ["act", "cr", "q", "x"]
    assert not list(PermuteChannels().wants(pinned("y = CumSum(r, last)"), ctx))


def test_refuses_where_nothing_was_seen() -> None:
    ctx = assert_refused(mlp(), PermuteChannels(), "no statistics of its channels")
    assert [s.node for s in ctx.skips] == ["e", "m"]


PINNED = """g (int64[B,S] ids, bool c, float[9,4] t, float[4,4] w, int64[1] two, int64[1] four,
    int64[1] last) => (float[B,S,D] y) { e = Gather(t, ids) m = MatMul(e, w) r = Relu(m)"""


def pinned(body: str) -> Graph:
    """``m`` is pinned by the body."""
    return parse(
        f"{PINNED} {body} }}",
        t=normal(9, 4),
        w=normal(4, 4),
        two=np.array([2]),
        four=np.array([4]),
        last=np.array([-1]),
    )


BRANCHES = """y = If (c) <
    then_branch = yes () => (float[B,S,D] p) { p = MatMul(r, w) },
    else_branch = no () => (float[B,S,D] q) { q = Neg(r) }
>"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Slice(r, two, four, last)", "Slice 'Slice:y' splits it"),
        ("y = CumSum(r, last)", "CumSum 'CumSum:y' may mix its entries"),
        (BRANCHES, "If 'If:y' may mix its entries"),
    ],
)
def test_refuses_a_pinned_class(body: str, reason: str) -> None:
    ctx = context()
    ctx.channels = {"r": stats(1, 2, 3, 4), "e": stats(4, 3, 2, 1)}
    assert_refused(pinned(body), PermuteChannels(), reason, ctx)


# Any order will do, and no order of a pinned class -------------------------------------------


def random_orders(found: list[ChannelClass], seed: int) -> list[tuple[ChannelClass, Array]]:
    """One for each class that may change, other than the one it has."""
    rng = np.random.default_rng(seed)
    return [(c, np.argsort(rng.random((*c.heads, c.size)), axis=-1)) for c in found]


def free(graph: Graph) -> list[ChannelClass]:
    return [c for c in channel_classes(graph, evaluate) if not c.pinned]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRAPHS)
def test_every_order_of_every_free_class_computes_the_same(name: str, seed: int) -> None:
    graph = GRAPHS[name]()
    before = [outputs(graph, f) for f in feeds(graph)]
    permute(graph, context(), random_orders(free(graph), seed))
    for f, expected in zip(feeds(graph), before, strict=True):
        assert_equivalent(expected, outputs(graph, f), atol=ATOL)


def test_an_order_of_a_pinned_class_shows() -> None:
    """Without this the analysis might pin what need not be, or the check see nothing."""
    graph = pinned("y = Slice(r, two, four, last)")
    forced = [c for c in channel_classes(graph, evaluate) if c.pinned]
    assert len(forced) == 1
    one = {"ids": feed(2, 5)["ids"], "c": np.array(True)}
    before = outputs(graph, one)
    permute(graph, context(), [(forced[0], np.array([2, 3, 0, 1]))])
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_equivalent(before, outputs(graph, one), atol=ATOL)


@pytest.mark.parametrize("name", GRAPHS)
def test_permuted_and_back_is_the_identity(name: str) -> None:
    """Bit for bit: values move, none is computed."""
    graph = GRAPHS[name]()
    old = {n: array(t) for n, t in graph.constants().items()}
    chosen = random_orders(free(graph), 7)
    permute(graph, context(), chosen)
    once = {n: array(t) for n, t in graph.constants().items()}
    back = [
        (in_new_names(item), np.argsort(order, axis=-1, kind="stable")) for item, order in chosen
    ]
    permute(graph, context(), back)
    twice = {n: array(t) for n, t in graph.constants().items()}
    moved = [n for n in old if f"{n}/permuted" in once]
    assert any(not np.array_equal(once[f"{n}/permuted"], old[n]) for n in moved)
    for n in moved:
        assert np.array_equal(twice[f"{n}/permuted/permuted"], old[n])


def in_new_names(item: ChannelClass) -> ChannelClass:
    """The class after its constants were permuted once."""
    constants = tuple(replace(m, tensor=f"{m.tensor}/permuted") for m in item.constants)
    return replace(item, constants=constants, activations=(), outputs=())
