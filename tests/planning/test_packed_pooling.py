"""Pooling that exporters write is found by what it computes, and reads the rows of real tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.pooling import KINDS, PoolingKind, add_pooling
from qcompile.passes.lower.remove_padding import RemovePadding
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_equivalent, normal, outputs, parse, run_pass

# Sums of up to 9 products of values of about 1, in another order.
ATOL = 1e-5
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]],
    "a sentence of padding": [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    "one row for all": [[1, 1, 0, 0, 0]],
    "one column for all": [[1], [1], [1]],
}
# As transformers' documentation has it: the mask is repeated for all channels, also to be counted.
MEAN = """
    u = Unsqueeze(attention_mask, last) s = Shape(h) e = Expand(u, s) f = Cast<to = 1>(e)
    k = Mul(h, f) t = ReduceSum<keepdims = 0>(k, second) n = ReduceSum<keepdims = 0>(f, second)
    c = Clip(n, small) y = Div(t, c)
"""
FORMS = {
    "mean": MEAN,
    "sum that keeps the axis": """u = Unsqueeze(attention_mask, last) f = Cast<to = 1>(u)
        k = Mul(f, h) t = ReduceSum(k, second) y = Squeeze(t, second)""",
    "weights that sum to one": """f = Cast<to = 1>(attention_mask) n = ReduceSum(f, last)
        d = Max(n, small) v = Div(f, d) u = Unsqueeze(v, last) k = Mul(h, u)
        y = ReduceSum<keepdims = 0>(k, second)""",
    "product": """f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, second) t = MatMul(u, h)
        y = Squeeze(t, second)""",
    "max": """u = Unsqueeze(attention_mask, last) p = Equal(u, none) k = Where(p, low, h)
        y = ReduceMax<axes = [1], keepdims = 0>(k)""",
    "max of what is shown": """b = Cast<to = 9>(attention_mask) u = Unsqueeze(b, last)
        k = Where(u, h, low) y = ReduceMax<axes = [-2], keepdims = 0>(k)""",
    "sum of what is shown": """b = Cast<to = 9>(attention_mask) u = Unsqueeze(b, last)
        k = Where(u, h, nil) y = ReduceSum<keepdims = 0>(k, second)""",
}


PICKS = {
    "last by an index from the end": """v = Slice(attention_mask, last, far, second, last)
        p = ArgMax<axis = 1>(v) i = Sub(last, p) y = GatherND<batch_dims = 1>(h, i)""",
    "first, with its axis": """p = ArgMax<axis = 1>(attention_mask) i = Unsqueeze(p, second)
        k = GatherND<batch_dims = 1>(h, i) y = Squeeze(k, second)""",
}


def model(pooling: str, out: str = "float[B,8] y") -> Graph:
    """A position-wise block and what comes after it."""
    return parse(
        f"""g (float[B,S,8] x, int64[B,S] attention_mask) => ({out}) {{
            m = MatMul(x, w) a = Add(m, bias) h = Relu(a)
            {pooling}
        }}""",
        w=normal(8, 8),
        bias=normal(8),
        last=np.array([-1]),
        far=np.array([-(2**62)]),
        second=np.array([1]),
        none=np.array(0),
        nil=np.array(0, np.float32),
        small=np.array(1e-9, np.float32),
        low=np.array(-1e9, np.float32),
    )


def feed(mask: list[list[int]]) -> dict[str, Array]:
    return {"x": normal(3, 5, 8), "attention_mask": np.array(mask)}


def check_packed(
    graph: Graph, masks: Mapping[str, list[list[int]]] = MASKS, states: str = "h"
) -> None:
    """Nothing is unpacked, and the answers are those of before."""
    before = {name: outputs(graph, feed(mask)) for name, mask in masks.items()}
    assert run_pass(graph, RemovePadding()).skips == []
    assert states not in graph.tensors(), "the states were unpacked"
    for name, mask in masks.items():
        assert_equivalent(before[name], outputs(graph, feed(mask)), atol=ATOL)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_exporters(form: str) -> None:
    masks = dict(MASKS)
    if form == "product":  # which does not broadcast over positions
        del masks["one column for all"]
    check_packed(model(FORMS[form]), masks)


@pytest.mark.parametrize("form", PICKS)
def test_picked_positions(form: str) -> None:
    """Of sentences with a real token, since states at padding are unspecified."""
    check_packed(model(PICKS[form]), {name: MASKS[name] for name in ("right", "left", "holes")})


def test_several_positions_of_each_sentence_are_no_pooling() -> None:
    graph = model(
        """p = ArgMax<axis = 1>(attention_mask) two = Concat<axis = 1>(p, p)
        i = Unsqueeze(two, last) k = GatherND<batch_dims = 1>(h, i)
        y = ReduceMax<axes = [1], keepdims = 0>(k)"""
    )
    before = outputs(graph, feed(MASKS["left"]))
    run_pass(graph, RemovePadding())
    assert_equivalent(before, outputs(graph, feed(MASKS["left"])), atol=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_own_forms(kind: PoolingKind) -> None:
    graph = model("last_hidden_state = Identity(h)", "float[B,S,8] last_hidden_state")
    add_pooling(graph, kind, normalize=True)
    shape_inference.infer(graph)
    check_packed(graph, states="last_hidden_state")


def test_a_count_is_not_repeated_for_all_channels() -> None:
    graph = model(MEAN)
    run_pass(graph, RemovePadding())
    sums = [n for n in graph.nodes if n.op == "ReduceSum"]
    assert all(n.inputs[0].shape is None or n.inputs[0].shape[-1] != 8 for n in sums)


def test_states_that_are_an_output_too_are_unpacked() -> None:
    graph = model(MEAN, "float[B,8] y, float[B,S,8] h")
    before = outputs(graph, feed(MASKS["right"]))
    run_pass(graph, RemovePadding())
    found = outputs(graph, feed(MASKS["right"]))
    np.testing.assert_allclose(found["y"], before["y"], atol=ATOL)
    real = np.array(MASKS["right"]) != 0
    np.testing.assert_allclose(found["h"][real], before["h"][real], atol=ATOL)


def test_no_sentence_sees_the_values_of_another() -> None:
    graph = model(MEAN)
    run_pass(graph, RemovePadding())
    values = feed(MASKS["right"])
    values["x"][1, 2] = np.nan
    found = outputs(graph, values)["y"]
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize(
    "pooling",
    [
        # the mask of another axis: eight tokens look like eight channels
        """f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, second) k = Mul(h, u)
        y = ReduceSum<keepdims = 0>(k, second)""",
        # weights that are not 0 at padding
        """f = Cast<to = 1>(attention_mask) g = Add(f, small) u = Unsqueeze(g, last)
        k = Mul(h, u) y = ReduceSum<keepdims = 0>(k, second)""",
        # a maximum that also sees 0 at padding
        """b = Cast<to = 9>(attention_mask) u = Unsqueeze(b, last)
        k = Where(u, h, nil) y = ReduceMax<axes = [1], keepdims = 0>(k)""",
    ],
)
def test_what_is_no_pooling_of_real_tokens_stays(pooling: str) -> None:
    graph = model(pooling)
    run_pass(graph, RemovePadding())
    assert not any(n.op == "Scan" for n in graph.nodes)
