"""The manager holds passes to their word, and instruments see what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from qcompile.errors import InvariantError, ModelError, PassError, RecipeError
from qcompile.ir import Graph, shape_of
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.planning import Context, Decision, Use
from qcompile.quant import QSpec
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.rewriting.instruments import Dump, Time, Verify
from qcompile.rewriting.pass_manager import PassManager
from qcompile.rewriting.testing import context, model_proto

TEXT = "g (float[2] x) => (float[2] y) { [neg] a = Neg(x) [abs] y = Abs(a) }"


def graph(text: str = TEXT) -> Graph:
    return from_proto(model_proto(text))


@dataclass(frozen=True)
class Does(Pass):
    """Runs any function; says that it changed the graph where ``claim`` is set."""

    action: Callable[[Graph, Context], object] = lambda g, c: None
    claim: bool = False

    name: ClassVar[str] = "does"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        self.action(graph, ctx)
        return self.claim


@dataclass(frozen=True)
class Inserts(Does):
    name: ClassVar[str] = "inserts"
    stage: ClassVar[Stage] = Stage.INSERT


def bypass(graph: Graph, ctx: Context) -> None:
    graph.set_input(graph.find("abs"), 0, graph.tensors()["x"])
    graph.remove_dead()


def run(*passes: Pass, ctx: Context | None = None) -> bool:
    return PassManager(passes, (Verify(),)).run(graph(), ctx or context())


def test_honest_claims() -> None:
    assert not run(Does())
    assert run(Does(bypass, claim=True))
    assert run(Does(), Does(bypass, claim=True))


def test_a_silent_change_is_caught() -> None:
    with pytest.raises(PassError, match="'does' returned False, but the graph changed"):
        run(Does(bypass))


def test_an_empty_claim_is_caught() -> None:
    with pytest.raises(PassError, match="'does' returned True, but the graph did not change"):
        run(Does(claim=True))


def make_cycle(graph: Graph, ctx: Context) -> None:
    graph.set_input(graph.find("neg"), 0, graph.tensors()["y"])


def make_dangling(graph: Graph, ctx: Context) -> None:
    graph.find("neg").outputs.clear()


def lose_node(graph: Graph, ctx: Context) -> None:
    graph.find("gone")


@pytest.mark.parametrize(
    ("action", "kind", "said"),
    [
        (make_cycle, PassError, "pass 'does' broke the graph: the graph has a cycle"),
        (make_dangling, InvariantError, "after pass 'does': inputs-come-first"),
        (lose_node, InvariantError, "pass 'does': node 'gone' is not in the graph"),
    ],
)
def test_failures_name_the_pass(
    action: Callable[[Graph, Context], None], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        run(Does(action, claim=True))


@dataclass(frozen=True)
class Fails(Pass):
    """Has a bug."""

    depth: int = 1
    name: ClassVar[str] = "fails"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: Context) -> bool:
        return bool([][self.depth])


def test_a_bug_names_the_pass_and_how_to_replay_it() -> None:
    said = r"pass 'fails' failed: IndexError: .*replay with --pipeline 'fails\{depth=2\}'"
    with pytest.raises(PassError, match=said) as caught:
        run(Fails(2))
    assert isinstance(caught.value.__cause__, IndexError)


def test_what_a_user_asked_wrongly_stays_the_users_error() -> None:
    def refuse(graph: Graph, ctx: Context) -> None:
        raise RecipeError("no such pattern")

    with pytest.raises(RecipeError, match=r"^no such pattern$"):
        run(Does(refuse))


def test_an_unsound_input_is_the_models_fault() -> None:
    text = TEXT.replace("Abs(a)", "Gelu(a)")
    manager = PassManager((Does(),), (Verify(),))
    with pytest.raises(ModelError, match="input model is not valid: operators-exist"):
        manager.run(graph(text), context())


def test_plans_are_verified_until_they_are_carried_out() -> None:
    ctx = context()
    spec = QSpec("uint8", symmetric=False)
    ctx.plan.decide(Decision("a", "activation", spec, "because", (Use("abs", 0),)))
    with pytest.raises(InvariantError, match=r"after pass 'does': plan: .*expected 'a'"):
        run(Does(bypass, claim=True), ctx=ctx)
    assert run(Inserts(bypass, claim=True), ctx=ctx)


def test_types_follow_a_change() -> None:
    made = graph()

    def append(graph: Graph, ctx: Context) -> None:
        new = graph.add("Exp", [graph.tensors()["x"]], ["new"]).outputs[0]
        graph.set_input(graph.find("neg"), 0, new)

    PassManager((Does(append, claim=True),)).run(made, context())
    assert shape_of(made.tensors()["new"]) == (2,)
    assert [n.op for n in made.nodes] == ["Exp", "Neg", "Abs"]


def test_time_records_what_each_pass_did() -> None:
    timer, ctx, seen = Time(), context(), list[str]()
    refuse = Does(lambda g, c: c.skip("neg", "not today"))
    manager = PassManager((Does(bypass, claim=True), refuse, refuse), (timer,))
    manager.run(graph(), ctx, seen.append)
    rows = [(r.name, r.changed, r.nodes_before, r.nodes_after, r.skips) for r in timer.records]
    assert rows == [("does", True, 2, 1, 0), ("does", False, 1, 1, 1), ("does", False, 1, 1, 0)]
    assert all(r.seconds >= 0 for r in timer.records)
    assert seen == ["does"] * 3
    assert [(s.pass_name, s.node, s.reason) for s in ctx.skips] == [("does", "neg", "not today")]


def test_dump_writes_a_file_for_each_change(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    passes = (Does(), Does(bypass, claim=True), Does())
    PassManager(passes, (Dump(folder),)).run(graph(), context())
    assert sorted(p.name for p in folder.iterdir()) == ["000_input.txt", "002_does.txt"]
    assert "%a = Neg(%x)" in (folder / "000_input.txt").read_text()
    assert "%y = Abs(%x)" in (folder / "002_does.txt").read_text()
