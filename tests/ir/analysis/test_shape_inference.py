"""Types and shapes: what inference says, what stays declared, what stays symbolic."""

from __future__ import annotations

import numpy as np

from qcompile.ir import Graph, shape_of
from qcompile.ir.analysis.shape_inference import infer, inferred_shapes
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.rewriting.testing import model_proto


def graph_of(text: str) -> Graph:
    return from_proto(model_proto(text))


def test_types_and_shapes_are_filled_in() -> None:
    graph = graph_of(
        """g (float[B,S,4] x) => (float[A,C,D] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> {
            a = MatMul(x, w) s = Shape(a) y = Relu(a)
        }"""
    )
    assert infer(graph) == []
    found = {n: (t.dtype, shape_of(t)) for n, t in graph.tensors().items()}
    assert found["a"] == (np.float32, ("B", "S", 2))
    assert found["s"] == (np.int64, (3,))
    assert found["y"] == (np.float32, ("A", "C", "D"))  # as the model declares
    assert inferred_shapes(graph)["y"] == ("B", "S", 2)


def test_contrib_outputs_are_unknown_unless_typed() -> None:
    graph = graph_of(
        "g (float[B,4] x) => (float[B,4] y) { a = com.microsoft.New(x) b = Neg(a) y = Add(b, x) }"
    )
    assert infer(graph) == ["a", "b"]
    tensor = graph.tensors()["a"]
    tensor.dtype, tensor.shape = np.dtype(np.float32), ["B", 4]
    assert infer(graph) == []
    assert shape_of(graph.tensors()["b"]) == ("B", 4)


def test_wrong_shapes_written_beside_tensors_are_replaced() -> None:
    graph = graph_of("g (float[B,4] x) => (float[B,4] y) <float[9,9] a> { a = Neg(x) y = Neg(a) }")
    assert shape_of(graph.tensors()["a"]) == (9, 9)
    infer(graph)
    assert shape_of(graph.tensors()["a"]) == ("B", 4)


def test_what_inference_cannot_say_keeps_what_was_written() -> None:
    """A custom operator ahead: its reader's type is known, its shape only from the exporter."""
    graph = graph_of(
        """g (float[B,4] x) => (float[B,4] y) <float[B,4] b> {
            a = com.microsoft.FancyOp(x) b = Cast<to = 1>(a) y = Neg(b)
        }"""
    )
    infer(graph)
    assert shape_of(graph.tensors()["b"]) == ("B", 4)


def test_sizes_that_depend_on_values_stay_unknown() -> None:
    graph = graph_of("g (float[B,4] x) => (int64[R,C] y) { y = NonZero(x) }")
    (rows, columns) = inferred_shapes(graph)["y"]
    assert rows == 2 and not isinstance(columns, int)


def test_sequences_have_no_shape() -> None:
    graph = graph_of(
        """g (float[B,4] x) => (float[B,4] y) <int64 i = {0}> {
            s = SequenceConstruct(x, x) y = SequenceAt(s, i)
        }"""
    )
    assert infer(graph) == ["s"]


def test_what_inference_rejects_is_unknown_not_an_error() -> None:
    graph = graph_of(
        "g (float[2,3] x, float[5,7] w) => (float[N] y) { a = MatMul(x, w) y = Abs(a) }"
    )
    assert infer(graph) == ["a"]
    assert "a" not in inferred_shapes(graph)
