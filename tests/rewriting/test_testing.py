"""The helpers that tests of passes stand on: each check is seen to fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import pytest

from qcompile.errors import InvariantError
from qcompile.ir import Graph, array
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.simplify.eliminate_identity import EliminateIdentity
from qcompile.planning import Context
from qcompile.quant import Array
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.rewriting.testing import (
    assert_equivalent,
    assert_refused,
    check,
    differential,
    filecheck,
    model_proto,
    normal,
    outputs,
    parse,
    plan_text,
    random_feed,
    run_pass,
)

TEXT = "a = Add(x, y)\nb = Mul(a, a)\nc = Exp(b)\n"
SUM = "g (float[N,4] x) => (float[N,4] y) { s = Add(x, w) y = Identity(s) }"


def graph() -> Graph:
    return parse(SUM, w=normal(4))


# FileCheck ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "directives",
    [
        "CHECK: Mul(",
        "CHECK: [[A:[a-z]]] = Add\nCHECK-NEXT: = Mul([[A]], [[A]])",
        "CHECK: Add\nCHECK-NOT: Sub\nCHECK: Exp",
        "CHECK-DAG: Exp\nCHECK-DAG: Add",
        "CHECK: b =\nCHECK-SAME: Mul",
        "CHECK-COUNT-3: =",
        "CHECK{LITERAL}: Add(x, y)",
        "\n    CHECK: Add\n\n    CHECK: Mul\n",
    ],
)
def test_directives_that_match(directives: str) -> None:
    filecheck(TEXT, directives)


@pytest.mark.parametrize(
    "directives",
    [
        "CHECK: Sub(",
        "CHECK: Mul\nCHECK: Add",  # in this order
        "CHECK: Add\nCHECK-NEXT: Exp",
        "CHECK: Add\nCHECK-SAME: Mul",
        "CHECK-NOT: Mul",
        "CHECK: Add\nCHECK-NOT: Mul\nCHECK: Exp",
        "CHECK: Exp\nCHECK-NOT: b",
        "CHECK-COUNT-4: =",
        "CHECK: [[A:[a-z]]] = Mul\nCHECK-NEXT: Exp([[A]], ",
        "CHECK: [[A:[a-z]]] = Add\nCHECK-NEXT: [[A]] =",
        "CHECK-DAG: Exp\nCHECK-DAG: Sub",
        "CHECK{LITERAL}: {{Add}}",
    ],
)
def test_directives_that_do_not_match(directives: str) -> None:
    with pytest.raises(AssertionError, match="--- dump ---"):
        filecheck(TEXT, directives)


@pytest.mark.parametrize(
    "line",
    [
        "CHECKNEXT: Sub",
        "CHECK :Sub",
        "CHECK-NEXT Sub",
        "CHECK-NOT : Mul",
        "CHECK_NOT: Mul",
        "CHECK-NEVER: Mul",
        "CHECK-COUNT: Sub",
        "CHECK-COUNT-0: Sub",
        "check: Sub",
        "Check-Next: Sub",
        "CHEKC: Sub",
        "RUN: CHECK: Sub",
        "%s = Sub(",
    ],
)
def test_lines_that_would_check_nothing_are_an_error(line: str) -> None:
    """filecheck itself passes over nearly all of them in silence, whether they hold or not."""
    with pytest.raises(AssertionError, match="it would check nothing"):
        filecheck(TEXT, f"CHECK: Add\n{line}")


@pytest.mark.parametrize("directives", ["", "\n  \n"])
def test_no_directive_is_an_error(directives: str) -> None:
    with pytest.raises(AssertionError, match="no CHECK directive"):
        filecheck(TEXT, directives)


@pytest.mark.parametrize(
    "directives",
    ["CHECK:", "CHECK: [[A]]", "CHECK: {{(}}", "CHECK: [[A:[", "CHECK: a[[A:x*]] = Add"],
)
def test_malformed_directives_are_an_error(directives: str) -> None:
    with pytest.raises(AssertionError):
        filecheck(TEXT, directives)


def test_an_empty_text_matches_nothing() -> None:
    with pytest.raises(AssertionError):
        filecheck("", "CHECK-NOT: Add")


def test_a_graph_is_checked_in_its_dump() -> None:
    check(graph(), "CHECK: %s = Add(%x, @w:f32[4]")
    with pytest.raises(AssertionError, match=r"--- dump ---\ngraph g\(%x: f32\[N,4\]\)"):
        check(graph(), "CHECK: %s = Add(@w")


# Comparing answers ----------------------------------------------------------------------------


def test_equal_answers() -> None:
    nan = np.array([np.nan, np.inf, 1], np.float32)
    assert_equivalent({"y": nan}, {"y": nan.copy()}, atol=0)


OLD = np.array([[1, 2, 1000]], np.float32)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (OLD + np.float32(0.25), "Not equal to tolerance"),
        (np.array([[1, 2, np.nan]], np.float32), "nan"),
        (OLD.reshape(3), r"y: \(3,\), expected \(1, 3\)"),
        (OLD.astype(np.float64), "y: float64, expected float32"),
    ],
    ids=["value", "nan", "shape", "dtype"],
)
def test_answers_that_differ(new: Array, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_equivalent({"y": OLD}, {"y": new}, atol=0.2)


def test_the_default_tolerance_is_none() -> None:
    """Not even relative: one unit in the last place of 1000 is seen."""
    with pytest.raises(AssertionError):
        assert_equivalent({"y": OLD}, {"y": np.nextafter(OLD, np.float32(0))}, atol=0)


@pytest.mark.parametrize("names", [["x"], ["y", "z"], []])
def test_outputs_that_differ(names: list[str]) -> None:
    with pytest.raises(AssertionError, match="expected"):
        assert_equivalent({"y": OLD}, dict.fromkeys(names, OLD), atol=1)


# Running passes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift(Pass):
    """Adds to the weight, and breaks the graph where asked to."""

    by: float = 0.0
    dangling: bool = False
    reason: str = ""

    name: ClassVar[str] = "shift"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, graph: Graph, ctx: Context) -> bool:
        node = graph.nodes[0]
        if self.reason:
            ctx.skip(node, self.reason)
        if self.dangling:
            graph.set_input(node, 0, type(graph.inputs[0])("nowhere"))
        elif self.by:
            graph.set_constant(node, 1, array(node.inputs[1]) + np.float32(self.by))
        return self.dangling or bool(self.by)


def test_differential_within_its_tolerance() -> None:
    differential(graph(), Shift(0.25), atol=0.26)
    ctx = differential(graph(), EliminateIdentity(), Shift(0.25), atol=0.26)
    assert ctx.running == "shift"


def test_differential_beyond_its_tolerance() -> None:
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        differential(graph(), Shift(0.25), atol=0.24)


def test_differential_of_a_pass_that_does_nothing() -> None:
    with pytest.raises(AssertionError, match="compare the graph with itself"):
        differential(graph(), Shift(), atol=1)


def test_the_graph_is_verified_after_a_pass() -> None:
    with pytest.raises(InvariantError, match="after pass 'shift': inputs-come-first"):
        run_pass(graph(), Shift(dangling=True))


def test_a_refusal() -> None:
    ctx = assert_refused(graph(), Shift(reason="it is too much"), "too much")
    assert [s.node for s in ctx.skips] == ["Add:s"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Shift(), r"no reason with 'too much' in \[\]"),
        (Shift(reason="it is too little"), "no reason with 'too much' in"),
        (Shift(by=1, reason="it is too much"), "shift changed the graph"),
    ],
)
def test_what_is_no_refusal(item: Pass, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_refused(graph(), item, "too much")


def test_the_text_of_a_plan() -> None:
    ctx = run_pass(parse(SUM.replace("Add", "MatMul"), w=normal(4, 4)), PlanOperands())
    lines = plan_text(ctx).splitlines()
    assert lines[0].startswith("weight w: int8:sym:channel[1]:pairs at MatMul:s.1 because ")
    assert lines[1].startswith("activation x: uint8:asym:tensor at MatMul:s.0 because ")


# Inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [SUM, SUM.replace("x)", "x, float[4] w)", 1)])
def test_weights_need_no_declaration_and_take_the_place_of_inputs(text: str) -> None:
    assert [i.name for i in model_proto(text, w=normal(4)).graph.input] == ["x"]
    made = parse(text, w=normal(4))
    assert [t.name for t in made.inputs] == ["x"]
    np.testing.assert_array_equal(array(made.constants()["w"]), normal(4))
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(outputs(made, {"x": x})["y"], x + normal(4))


def test_text_that_is_no_valid_model_is_an_error() -> None:
    with pytest.raises(onnx.checker.ValidationError, match="w"):
        parse(SUM)
    with pytest.raises(onnx.parser.ParseError):
        model_proto("g (float[N] x) {}")


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("y = Relu(x)", {"": 14}),
        (
            "a = com.microsoft.Gelu(x) y = acme.Op<k = 1.5>(a)",
            {"": 14, "com.microsoft": 1, "acme": 1},
        ),
    ],
)
def test_the_header_declares_the_domains_that_operators_name(
    text: str, imports: dict[str, int]
) -> None:
    made = model_proto(f"g (float[N] x) => (float[N] y) {{ {text} }}", 14)
    assert {o.domain: o.version for o in made.opset_import} == imports
    own = model_proto('<ir_version: 9, opset_import: ["": 20]> g (int8 x) => (int8 x) {}')
    assert (own.ir_version, own.opset_import[0].version) == (9, 20)


def test_random_feeds_are_the_same_in_every_run() -> None:
    text = "g (float[B,S,2] x, float[S,B] z) => (float[B,S,2] y) { y = Relu(x) }"
    feed = random_feed(parse(text), seed=3, dims=(4, 5))
    assert {n: v.shape for n, v in feed.items()} == {"x": (4, 5, 2), "z": (5, 4)}
    again = random_feed(parse(text), seed=3, dims=(4, 5))
    assert_equivalent(feed, again, atol=0)
    assert not np.array_equal(feed["x"], random_feed(parse(text), seed=4, dims=(4, 5))["x"])
