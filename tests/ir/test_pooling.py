"""Pooling in the graph computes what sentence-transformers computes outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qcompile.errors import ModelError
from qcompile.ir import Graph
from qcompile.ir.pooling import EMBEDDING, KINDS, PoolingKind, add_pooling
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, outputs, parse

# Sums of up to 6 values of about 1 in float32, divided by their number or by a length of about 1.
ATOL = 1e-6
RIGHT = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
LEFT = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
HOLES = [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]


def model(
    states: str = "float[B,S,6]", mask: str = "int64[B,S] attention_mask", opset: int = 17
) -> Graph:
    """A model that returns its input as the states of tokens."""
    text = f"""g ({states} x, {mask}) => ({states} last_hidden_state) {{
        last_hidden_state = Identity(x)
    }}"""
    return parse(text, opset)


def expected(kind: str, x: Array, mask: Array, normalize: bool = False) -> npt.NDArray[Any]:
    """As the module Pooling of sentence-transformers 6 and torch's normalize, in float64."""
    x, m = x.astype(np.float64), np.broadcast_to(mask, x.shape[:2])[..., None].astype(np.float64)
    first, rows = (m[..., 0] != 0).argmax(1), np.arange(len(x))
    if kind == "cls":
        y = x[rows, first]
    elif kind == "lasttoken":
        y = x[rows, x.shape[1] - 1 - (m[:, ::-1, 0] != 0).argmax(1)]
    elif kind == "max":
        y = np.where(m == 0, -1e9, x).max(1)
    else:
        if kind == "weightedmean":
            m = m * (1 + np.arange(x.shape[1])[None, :, None] - first[:, None, None])
        total = np.maximum(m.sum(1), 1e-9)
        y = (x * m).sum(1) / (np.sqrt(total) if kind == "mean_sqrt_len_tokens" else total)
    length = np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)
    return np.asarray(y / length if normalize else y)


def pooled(graph: Graph, x: Array, mask: Array) -> Array:
    return outputs(graph, {"x": x, "attention_mask": mask})[EMBEDDING]


@pytest.mark.parametrize("opset", [12, 13, 17, 18])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_pooling_outside(kind: PoolingKind, opset: int) -> None:
    graph, x = model(opset=opset), normal(3, 5, 6)
    add_pooling(graph, kind)
    for mask in (RIGHT, LEFT, HOLES, [[1, 1, 0, 0, 0]]):
        found = pooled(graph, x, np.array(mask))
        np.testing.assert_allclose(found, expected(kind, x, np.array(mask)), atol=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_length_one(kind: PoolingKind) -> None:
    graph, x, mask = model(), normal(3, 5, 6), np.array(LEFT)
    add_pooling(graph, kind, normalize=True)
    found = pooled(graph, x, mask)
    np.testing.assert_allclose(found, expected(kind, x, mask, normalize=True), atol=ATOL)


def test_that_comparison_would_see_padding() -> None:
    graph, x = model(), normal(3, 5, 6)
    add_pooling(graph, "mean")
    found = pooled(graph, x, np.ones((3, 5), np.int64))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found, expected("mean", x, np.array(RIGHT)), atol=ATOL)


@pytest.mark.parametrize("kind", ["mean", "cls", "lasttoken", "weightedmean"])
def test_a_sentence_without_tokens_is_zero(kind: PoolingKind) -> None:
    graph = model()
    add_pooling(graph, kind, normalize=True)
    found = pooled(graph, normal(2, 3, 6), np.array([[0, 0, 0], [1, 1, 1]]))
    assert not found[0].any() and found[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_pooled_in_float32(kind: PoolingKind) -> None:
    graph = model(states="float16[B,S,6]")
    add_pooling(graph, kind)
    x = (normal(1, 512, 6) + 300).astype(np.float16)  # a sum in float16 is infinite
    found = pooled(graph, x, np.ones((1, 512), np.int64))
    assert found.dtype == np.float16
    want = expected(kind, x, np.ones((1, 512)))
    np.testing.assert_allclose(found, want, rtol=2**-10)  # half a unit in the last place, rounded


def test_double_precision_stays() -> None:
    graph, x, mask = model(states="double[B,S,6]"), normal(3, 5, 6), np.array(RIGHT)
    add_pooling(graph, "mean", normalize=True)
    found = pooled(graph, x.astype(np.float64), mask)
    np.testing.assert_allclose(found, expected("mean", x, mask, normalize=True), atol=1e-15)


def test_masks_of_other_types_and_names() -> None:
    for mask in ("bool[B,S] attention_mask", "int32[B,S] attention_mask", "int64[B,S] input_mask"):
        graph, x = model(mask=mask), normal(3, 5, 6)
        add_pooling(graph, "mean")
        name = mask.split()[1]
        values = np.array(RIGHT).astype(graph.inputs[1].dtype)
        found = outputs(graph, {"x": x, name: values})[EMBEDDING]
        np.testing.assert_allclose(found, expected("mean", x, np.array(RIGHT)), atol=ATOL)


def test_the_states_are_replaced_unless_kept() -> None:
    text = """g (float[B,S,6] x, int64[B,S] attention_mask)
        => (float[B,6] pooler_output, float[B,S,6] last_hidden_state) {
        last_hidden_state = Identity(x) pooler_output = ReduceMax<axes = [1], keepdims = 0>(x)
    }"""
    graph = parse(text)
    add_pooling(graph, "mean")
    assert [t.name for t in graph.outputs] == [EMBEDDING, "pooler_output"]
    assert list(graph.outputs[0].shape) == ["B", 6]
    graph = parse(text)
    add_pooling(graph, "mean", keep=("last_hidden_state",))
    assert [t.name for t in graph.outputs] == [EMBEDDING, "pooler_output", "last_hidden_state"]


def test_cls_needs_no_mask() -> None:
    graph = parse("g (float[B,S,6] x) => (float[B,S,6] y) { y = Relu(x) }")
    add_pooling(graph, "cls")
    x = normal(2, 3, 6)
    np.testing.assert_array_equal(outputs(graph, {"x": x})[EMBEDDING], np.maximum(x[:, 0], 0))


@pytest.mark.parametrize(
    ("graph", "kind", "message"),
    [
        (
            parse("g (float[B,S,6] x) => (float[B,S,6] y) { y = Relu(x) }"),
            "mean",
            "pooling 'mean' needs an input 'attention_mask' [batch, sequence]",
        ),
        (
            parse("g (float[B,6] x) => (float[B,6] logits) { logits = Relu(x) }"),
            "mean",
            "'logits' [B, 6] is pooled already",
        ),
        (
            parse(f"g (float[B,6] x) => (float[B,6] {EMBEDDING}) {{ {EMBEDDING} = Relu(x) }}"),
            "mean",
            "output 'sentence_embedding' [B, 6] is pooled already",
        ),
        (
            parse("g (float[B,S,6] x) => (float[B,S,6] y, float[B,S,6] z) { y=Relu(x) z=Neg(x) }"),
            "mean",
            "several outputs could be pooled: 'y' [B, S, 6], 'z' [B, S, 6]",
        ),
        (parse("g (int64[B,S] x) => (int64[B,S] y) { y = Neg(x) }"), "cls", "nothing to pool"),
        (model(mask="float[B,S] attention_mask"), "mean", "it may be additive"),
        (model(opset=11), "mean", "pooling needs opset 12 or newer, the model has opset 11"),
    ],
)
def test_what_cannot_be_pooled(graph: Graph, kind: PoolingKind, message: str) -> None:
    with pytest.raises(ModelError) as e:
        add_pooling(graph, kind)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_tensor_of_that_name_inside() -> None:
    graph = parse(
        f"""g (float[B,S,6] x, int64[B,S] attention_mask) => (float[B,S,6] y) {{
            {EMBEDDING} = Relu(x) y = Neg({EMBEDDING})
        }}"""
    )
    with pytest.raises(ModelError, match="has a tensor or a node 'sentence_embedding' already"):
        add_pooling(graph, "mean")
