"""Shared names of dimensions hold where operators enforce them, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompile.ir import Graph
from qcompile.ir.analysis.dimension_names import base_name, separate_names
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.passes.simplify.fold_shapes import FoldShapes
from qcompile.rewriting.testing import encoder, model_proto, normal, outputs, parse, run_pass
from qcompile.runtime.session import evaluate


def graph_of(text: str, **weights: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Graph:
    return from_proto(model_proto(text, 17, **weights))


def names(graph: Graph) -> list[list[object]]:
    return [list(t.shape) for t in graph.inputs]


SWAP = """g (float[None,3,None,None] x) => (float[None,3,None,None] y) {
    t = Transpose<perm = [0, 1, 3, 2]>(x) s = Shape(x) y = Reshape(t, s)
}"""


def test_one_name_for_all_dimensions_is_no_constraint() -> None:
    graph = graph_of(SWAP)
    assert separate_names(graph, evaluate) == ["None"]
    assert names(graph) == [["None#0", 3, "None#1", "None#2"]]


def test_what_is_written_has_the_names_that_hold() -> None:
    """ONNX Runtime reuses buffers where names are equal."""
    graph = graph_of(SWAP)
    separate_names(graph, evaluate)
    proto = to_proto(graph).graph
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*proto.input, *proto.output)]  # fmt: skip
    assert dims == [["None#0", 3, "None#1", "None#2"], [0, 3, 0, 0]]


def test_an_image_that_is_not_square_is_not_taken_for_one() -> None:
    """By name, the Reshape would make what is there already."""
    feed = {"x": normal(1, 3, 4, 6)}
    expected = {False: False, True: True}
    for separated in expected:
        graph = graph_of(SWAP)
        before = outputs(graph, feed)["y"]
        if separated:
            separate_names(graph, evaluate)
        run_pass(graph, FoldShapes())
        right = np.array_equal(before, outputs(graph, feed)["y"])
        assert right is expected[separated]


def test_an_encoder_enforces_its_names() -> None:
    graph = encoder(layers=1)
    assert separate_names(graph, evaluate) == []
    assert names(graph) == [["B", "S"], ["B", "S"]]


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("(float[N,4] a, float[N,4] b) => (float[N,4] y) { y = Add(a, b) }", []),
        ("(float[N,4] a, float[N,4] b) => (float[M,4] y) { y = Concat<axis = 0>(a, b) }", ["N"]),
        ("(float[N,4] a, float[M,4] b) => (float[K,4] y) { y = Concat<axis = 0>(a, b) }", []),
        ("(float[N,L] a, float[N,M] b) => (float[N,K] y) { y = Concat<axis = 1>(a, b) }", []),
        ("(float[N,L] a, float[N,L] b) => (float[N,K] y) { y = Concat<axis = 1>(a, b) }", ["L"]),
        # in two thirds of the axes it holds
        (
            "(float[N] a, float[N] b, float[N] c) => (float[N] y, float[N] z) "
            "{ y = Add(a, b) z = Neg(c) }",
            ["N"],
        ),
        # the length of the sum is that of both
        (
            "(float[P,4] past, float[L,4] x, float[P + L,4] m) => (float[P + L,4] y) "
            "{ c = Concat<axis = 0>(past, x) y = Add(c, m) }",
            [],
        ),
    ],
)
def test_which_names_hold(text: str, free: list[str]) -> None:
    if "P + L" in text:
        graph = graph_of("g " + text.replace("P + L", "Q"))
        for value in (graph.inputs[2], graph.outputs[0]):
            value.shape = ["P + L", 4]
        assert separate_names(graph, evaluate) == free
        return
    graph = graph_of("g " + text)
    assert separate_names(graph, evaluate) == free


def test_the_axes_that_are_enforced_keep_the_name() -> None:
    graph = graph_of(
        "g (float[N] a, float[N] b, float[N] c) => (float[N] y, float[N] z) "
        "{ y = Add(a, b) z = Neg(c) }"
    )
    separate_names(graph, evaluate)
    assert names(graph) == [["N"], ["N"], ["N#0"]]


def test_which_branch_runs_depends_on_the_data() -> None:
    """In the other branch of the If nothing compares the two."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (bool c, float[N,4] a, float[N,4] b) => (float[M,4] y) {
        y = If(c) <
            then_branch = t () => (float[M,4] u) { u = Add(a, b) },
            else_branch = e () => (float[M,4] v) { v = Neg(a) }
        >
    }"""
    graph = from_proto(onnx.parser.parse_model(text))
    assert separate_names(graph, evaluate) == ["N"]


def test_operators_that_inference_does_not_know_may_enforce_names() -> None:
    """An exporter is believed there, but for a name that one input repeats."""
    text = "g (float[N,4] a, float[N,4] b) => (float[N,4] y) { y = com.microsoft.BiasGelu(a, b) }"
    assert separate_names(graph_of(text), evaluate) == []
    text = "g (float[N,N] a, float[N] b) => (float[N,N] y) { y = com.microsoft.BiasGelu(a, b) }"
    assert separate_names(graph_of(text), evaluate) == ["N"]


def test_no_shared_name_costs_no_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.ir.analysis.dimension_names.skeleton", None)
    assert separate_names(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"), evaluate) == []


def test_the_old_name_is_known() -> None:
    assert [base_name(n) for n in ("batch#0", "batch", "a#b", "#1")] == [
        "batch",
        "batch",
        "a#b",
        "#1",
    ]
