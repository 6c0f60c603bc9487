"""Data or not: masks, indices and shapes are never taken for activations."""

from __future__ import annotations

import pytest

from qcompile.ir import Graph, is_layout
from qcompile.ir.analysis.data_path import (
    aliases,
    data_path,
    is_masking,
    layout_root,
    of_shapes,
)
from qcompile.rewriting.testing import normal, parse


def encoder() -> Graph:
    """Embeddings, one product, a mask made of integers."""
    return parse(
        """g (int64[B,S] ids, int64[B,S] attention_mask) => (float[B,S,4] y)
        <float one = {1}, float low = {-3.4e38}, float tiny = {-10}, float[1] inf = {0},
         int64[1] last = {-1}, float half = {0.5}> {
            e = Gather(table, ids) h = MatMul(e, w)
            m = Cast<to = 1>(attention_mask) inverted = Sub(one, m) bias = Mul(inverted, low)
            wide = Unsqueeze(bias, last)
            masked = Add(h, wide) scaled = Mul(masked, half) y = Softmax(scaled)
        }""",
        table=normal(8, 4),
        w=normal(4, 4),
    )


def test_the_data_path_starts_at_weights_and_leaves_masks_out() -> None:
    assert data_path(encoder()) == {"e", "h", "masked", "scaled", "y"}


def test_float_inputs_start_it_too_unless_they_are_masks() -> None:
    graph = parse(
        """g (float[2] x, float[2] attn_Mask) => (float[2] y) {
            m = Neg(attn_Mask) y = Add(x, m)
        }"""
    )
    assert data_path(graph) == {"x", "y"}


def test_masking_mixes_data_with_what_is_none_or_huge() -> None:
    graph = encoder()
    path = data_path(graph)
    found = {n.outputs[0].name for n in graph.nodes if is_masking(n, path)}
    assert found == {"inverted", "bias", "masked"}


@pytest.mark.parametrize(("value", "expected"), [("-9999", False), ("-10000", True), ("1e5", True)])
def test_huge_constants_are_masks(value: str, expected: bool) -> None:
    graph = parse(f"g (float[2] x) => (float[2] y) <float k = {{{value}}}> {{ y = Add(x, k) }}")
    assert is_masking(graph.nodes[0], {"x", "y"}) == expected


def test_layout_operators_pass_values_through() -> None:
    graph = parse(
        """g (float[2,6] x) => (float[6,2] y) <int64[2] k = {3, 4}> {
            a = Abs(x) b = Reshape(a, k) c = Transpose(b) d = Identity(c) y = Reshape(d, k)
        }"""
    )
    assert layout_root(graph, graph.tensors()["y"]).name == "a"
    assert layout_root(graph, graph.tensors()["a"]).name == "a"
    assert [n.op for n in graph.nodes if is_layout(n)] == [
        "Reshape",
        "Transpose",
        "Identity",
        "Reshape",
    ]


def test_a_tensor_goes_by_its_own_names_and_those_behind_layout_operators() -> None:
    graph = parse(
        """g (float[N,8] x) => (float[2,N,4] y, float[N,8] z) <int64[3] heads = {0, 2, 4}> {
            r = Relu(x)
            v = Reshape(r, heads)
            t = Transpose<perm = [1, 0, 2]>(v)
            y = Exp(t)
            z = Neg(r)
        }"""
    )
    tensors, nodes = aliases(graph, graph.tensors()["r"])
    assert tensors == ["r", "v", "t"]
    assert sorted(nodes) == ["Exp:y", "Neg:z", "Relu:r", "Reshape:v", "Transpose:t"]
    assert aliases(graph, graph.tensors()["y"]) == (["y"], ["Exp:y"])


def test_it_goes_through_bodies_by_what_they_read() -> None:
    graph = parse(
        """g (float[N,4] x, bool c) => (float[N,4] y) {
            i = If (c) <
                then_branch = yes () => (float[N,4] p) { p = Relu(x) },
                else_branch = no () => (float[N,4] q) { q = Neg(x) }
            >
            y = Tanh(i)
        }"""
    )
    assert data_path(graph) == {"x", "i", "y"}


@pytest.mark.parametrize("halves", [True, False])
def test_16_bit_floats_are_on_it_where_asked(halves: bool) -> None:
    graph = parse("g (float16[N,4] x) => (float16[N,4] y) { y = Tanh(x) }")
    assert data_path(graph, halves=halves) == ({"x", "y"} if halves else set())


def test_positions_depend_on_shapes_alone_and_random_numbers_on_more() -> None:
    graph = parse(
        """g (int64[B,S] ids, bool c) => (float[B,S,4] y, float[?] z)
        <int64 one = {1}, int64[1] none = {0}, int64[1] axes = {0}> {
            size = Shape(ids) length = Gather(size, one) ends = Unsqueeze(length, axes)
            positions = Slice(table, none, ends) words = Gather(table, ids)
            noise = RandomNormal<shape = [4]>() both = Add(positions, noise)
            y = Add(words, both)
            z = If(c) <
                then_branch = t () => (float[?] u) { u = Neg(positions) },
                else_branch = e () => (float[?] v) { v = Abs(positions) }
            >
        }""",
        table=normal(8, 4),
    )
    assert of_shapes(graph) == {"size", "length", "ends", "positions"}
