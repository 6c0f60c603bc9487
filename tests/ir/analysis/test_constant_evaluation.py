"""Folding: which nodes depend on constants alone, and what readers of a Shape get."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, Shape, array
from qcompile.ir.analysis.constant_evaluation import evaluable, fold_shape, put_values
from qcompile.rewriting.testing import outputs, parse
from qcompile.runtime.session import evaluate

CONSTANTS = "<float[2] c = {1, 2}, int64[1] one = {1}, int64[2] ends = {0, 2}, int64 two = {2}>"


def graph_of(body: str, results: str = "float[2] y") -> Graph:
    return parse(f"g (float[2] x, bool f) => ({results}) {CONSTANTS} {{ {body} }}")


def names(graph: Graph) -> list[str]:
    return [n.outputs[0].name for n in evaluable(graph, lambda _: True)]


def test_what_can_be_evaluated() -> None:
    graph = graph_of(
        """a = Neg(c) b = Add(a, c) d = Mul(x, b) e = RandomNormalLike(c) s = Shape(x)
        z = Constant<value_string="s">() w = Cast<to = 1>(two)
        q = Cast<to = 3>(c) r = DequantizeLinear(q, w)
        i = If (f) <
            then_branch = t () => (float[2] p) { p = Neg(c) },
            else_branch = e () => (float[2] o) { o = Abs(c) }
        >
        y = Add(d, i)"""
    )
    assert names(graph) == ["a", "b", "w", "q"]
    assert [n.op for n in evaluable(graph, lambda n: n.op != "Neg")] == ["Cast", "Cast"]


def test_values_replace_uses_but_not_names_that_are_needed() -> None:
    body = "a = Neg(c) b = Add(x, a) z = Abs(c) y = Mul(b, z)"
    graph = graph_of(body, "float[2] y, float[2] z")
    nodes = evaluable(graph, lambda _: True)
    values = evaluate(graph, nodes)
    assert isinstance(values, dict)
    assert put_values(graph, nodes, values)
    graph.remove_dead()
    assert [n.op for n in graph.nodes] == ["Add", "Abs", "Mul"]
    assert outputs(graph, {"x": np.zeros(2, np.float32), "f": np.array(True)})["y"].tolist() == [
        -1,
        -4,
    ]
    assert not put_values(graph, nodes, values)


def test_evaluation_that_fails_says_why() -> None:
    graph = graph_of("a = Gather(c, two) y = Add(x, a)")
    assert "out of data bounds" in str(evaluate(graph, graph.nodes[:1]))


def shape_graph(readers: str) -> Graph:
    """x is [B,S,4,6]; its Shape is read as told; every reader must end in output y."""
    values = {"b0": 0, "b2": 2, "b3": 3, "n1": -1, "big": 99}
    vectors = [f"int64[1] {name} = {{{value}}}" for name, value in values.items()]
    scalars = [f"int64 {n} = {{{v}}}" for n, v in {"i2": 2, "m1": -1, "i9": 9}.items()]
    constants = ", ".join(["int64[2] i23 = {2, 3}", *vectors, *scalars])
    head = f"g (float[B,S,4,6] x) => (int64[K] y) <{constants}>"
    return parse(f"{head} {{ s = Shape(x) {readers} }}")


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        ("r = Gather(s, i2)", 4),
        ("r = Gather(s, m1)", 6),
        ("r = Gather(s, i23)", [4, 6]),
        ("r = Slice(s, b2, big)", [4, 6]),
        ("r = Slice(s, b2, b3, b0)", [4]),
        ("r = Slice(s, b3, n1)", None),  # empty
        ("r = Slice(s, b0, b3)", None),  # holds B and S
        ("r = Slice(s, b2, big, b0, b2)", None),  # a step
        ("r = Slice(s, b2, big, , b2)", None),
        ("r = Gather(s, i9)", None),  # the runtime's to refuse
        ("r = Neg(s)", None),
    ],
)
def test_readers_of_fixed_dimensions_get_them(reader: str, expected: object) -> None:
    graph = shape_graph(f"{reader} y = Abs(r)")
    assert fold_shape(graph, graph.nodes[0], ("B", "S", 4, 6)) == (expected is not None)
    read = graph.nodes[-1].inputs[0]
    if expected is None:
        assert read.name == "r"
    else:
        assert array(read).tolist() == expected
        assert array(read).dtype == np.int64


@pytest.mark.parametrize(
    ("op", "shape", "expected"),
    [
        ("Shape(x)", (2, 3, 4, 6), [2, 3, 4, 6]),
        ("Shape<start = 2>(x)", ("B", "S", 4, 6), [4, 6]),
        ("Shape<start = -2, end = -1>(x)", ("B", "S", 4, 6), [4]),
        ("Shape(x)", ("B", 3, 4, 6), None),
        ("Shape(x)", None, None),
    ],
)
def test_a_whole_shape(op: str, shape: Shape | None, expected: list[int] | None) -> None:
    graph = parse(f"g (float[B,S,4,6] x) => (int64[K] y) {{ s = {op} y = Abs(s) }}")
    assert fold_shape(graph, graph.nodes[0], shape) == (expected is not None)
    if expected is not None:
        assert array(graph.nodes[-1].inputs[0]).tolist() == expected


def test_a_shape_that_is_an_output_stays() -> None:
    graph = parse("g (float[2] x) => (int64[1] y) { y = Shape(x) }")
    assert not fold_shape(graph, graph.nodes[0], (2,))
