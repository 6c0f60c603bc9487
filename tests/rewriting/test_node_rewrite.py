"""The loop of passes that rewrite around single nodes: what it visits, records and claims."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from qcompile.ir import Graph, Node, Refusal, Tensor
from qcompile.ir.printer import dump
from qcompile.planning import Context, Skip
from qcompile.rewriting import NodeRewrite, Numerics, Stage
from qcompile.rewriting.testing import check, context, parse, run_pass


@dataclass(frozen=True)
class CancelNeg(NodeRewrite[tuple[Tensor, Tensor]]):
    """Neg(Neg(x)) → x, found at the inner Neg; ``seen``: names of the nodes that were looked at."""

    seen: list[str] = field(default_factory=list)

    name: ClassVar[str] = "cancel-neg"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT
    ops: ClassVar[tuple[str, ...]] = ("Neg",)

    def match(
        self, graph: Graph, ctx: Context, node: Node
    ) -> tuple[Tensor, Tensor] | Refusal | None:
        self.seen.append(node.name)
        outer = next((n for n in graph.consumers(node.outputs[0]) if n.op == "Neg"), None)
        if outer is None:
            return None
        if graph.only_consumer(node.outputs[0]) is None:
            return Refusal("the negative has other readers")
        return outer.outputs[0], node.inputs[0]

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Tensor, Tensor]) -> None:
        graph.replace_uses(*match)
        graph.remove_dead()


@dataclass(frozen=True)
class SeesAll(CancelNeg):
    """Looks at all nodes, and leaves it to the loop to remove what is dead."""

    name: ClassVar[str] = "sees-all"
    ops: ClassVar[tuple[str, ...]] = ()

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Tensor, Tensor]) -> None:
        graph.replace_uses(*match)


def graph_of(body: str) -> Graph:
    return parse(f"g (float[2] x) => (float[2] y) {{{body}}}")


NOTHING = "[a] a = Neg(x) [y] y = Abs(a)"
DEAD = "[a] a = Neg(x) [b] b = Neg(a) [y] y = Abs(x)"
CHAIN = "[a] a = Neg(x) [b] b = Neg(a) [c] c = Neg(b) [y] y = Abs(c)"
READ_TWICE = "[a] a = Neg(x) [b] b = Neg(a) [y] y = Add(a, b)"


@pytest.mark.parametrize(
    ("body", "changed"), [(NOTHING, False), (READ_TWICE, False), (CHAIN, True), (DEAD, True)]
)
def test_it_claims_what_it_changed(body: str, changed: bool) -> None:
    graph, ctx = graph_of(body), context()
    before = dump(graph)
    assert CancelNeg().run(graph, ctx) is changed
    assert (dump(graph) != before) is changed


def test_a_node_that_does_not_match_is_no_refusal() -> None:
    assert run_pass(graph_of(NOTHING), CancelNeg()).skips == []


def test_a_refusal_is_recorded_once() -> None:
    graph = graph_of(READ_TWICE)
    ctx = run_pass(graph, CancelNeg(), CancelNeg())
    assert ctx.skips == [Skip("cancel-neg", "a", "the negative has other readers")]


def test_what_a_rewrite_removed_is_not_visited() -> None:
    graph, item = graph_of(CHAIN), CancelNeg()
    run_pass(graph, item)
    assert item.seen == ["a", "c"]
    check(graph, "CHECK: Neg(%x)\nCHECK-NOT: Neg(")


def test_nothing_dead_is_left() -> None:
    graph = graph_of(CHAIN)
    run_pass(graph, SeesAll())
    assert len(graph.nodes) == 2


def test_dead_readers_do_not_count() -> None:
    graph = graph_of("[a] a = Neg(x) [b] b = Neg(a) [d] d = Abs(a) [y] y = Abs(b)")
    ctx = run_pass(graph, CancelNeg())
    assert ctx.skips == [] and len(graph.nodes) == 1


def test_a_second_run_changes_nothing() -> None:
    graph, ctx = graph_of(CHAIN), context()
    run_pass(graph, CancelNeg(), ctx=ctx)
    assert CancelNeg().run(graph, ctx) is False


def test_without_operators_every_node_is_looked_at() -> None:
    graph, some, every = graph_of(NOTHING), CancelNeg(), SeesAll()
    run_pass(graph, some, every)
    assert (some.seen, every.seen) == (["a"], ["a", "y"])
