"""Position-wise layers see real tokens only; answers at real positions stay what they were."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.errors import ModelError
from qcompile.ir import Graph, Node
from qcompile.passes.lower.fusion.unfuse_skip_layernorm import UnfuseSkipLayerNorm
from qcompile.passes.lower.remove_padding import RemovePadding
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    encoder,
    normal,
    outputs,
    parse,
    run_pass,
)
from tests.passes.corpus import pooled

# A row's sums do not depend on the rows beside it, but kernels may add in another order for another
# number of rows: up to 32 products of values up to about 8, over two layers.
ATOL = 1e-5
PADDED = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


def tokens(mask: list[list[int]]) -> dict[str, Array]:
    shape = (len(mask), len(mask[0]))
    ids = np.random.default_rng(0).integers(0, 64, shape)
    return {"ids": ids, "attention_mask": np.array(mask, np.int64)}


@pytest.mark.parametrize(
    "mask",
    [
        PADDED,
        [[1, 1, 1, 1]],
        [[1]],
        [[0, 0, 1, 1], [1, 1, 1, 1]],  # padded on the left
        [[1, 0, 1, 0, 1]],
    ],
)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_real_positions_keep_their_answers(mask: list[list[int]], pre_norm: bool) -> None:
    graph, feed = encoder(pre_norm=pre_norm), tokens(mask)
    expected = outputs(graph, feed)["out"]
    run_pass(graph, UnfuseSkipLayerNorm(), RemovePadding())
    found = outputs(graph, feed)["out"]
    real = feed["attention_mask"] != 0
    assert found.shape == expected.shape
    np.testing.assert_allclose(found[real], expected[real], atol=ATOL)


def test_that_comparison_would_see_a_wrong_row() -> None:
    graph, feed = encoder(), tokens(PADDED)
    expected = outputs(graph, feed)["out"]
    real = feed["attention_mask"] != 0
    shifted = np.roll(expected[real], 1, axis=0)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(shifted, expected[real], atol=ATOL)


def test_padding_repeats_the_last_real_token() -> None:
    graph = encoder()
    run_pass(graph, RemovePadding())
    out = outputs(graph, tokens(PADDED))["out"]
    np.testing.assert_array_equal(out[0, 3:], out[0, [2, 2]])


def test_nothing_but_padding_still_runs() -> None:
    graph = encoder()
    run_pass(graph, RemovePadding())
    assert outputs(graph, tokens([[0, 0], [0, 0]]))["out"].shape == (2, 2, 8)


def rows(graph: Graph, feed: dict[str, Array]) -> list[int]:
    """How many rows each product with a weight works on."""
    import onnx

    from qcompile.ir.model_io.to_proto import serialize
    from qcompile.runtime.session import Session, with_outputs

    products = [n for n in graph.nodes if n.op == "MatMul" and not _is_attention(graph, n)]
    names = [n.outputs[0].name for n in products]
    tapped = with_outputs(onnx.ModelProto.FromString(serialize(graph)), names)
    found = Session(tapped.SerializeToString()).run(feed)
    return [int(np.prod(found[n].shape[:-1])) for n in names]


def _is_attention(graph: Graph, node: Node) -> bool:
    return all(graph.producer(t) is not None for t in node.inputs)


def test_layers_work_on_as_many_rows_as_there_are_tokens() -> None:
    graph, feed = encoder(), tokens(PADDED)
    assert set(rows(graph, feed)) == {15}
    run_pass(graph, RemovePadding())
    assert set(rows(graph, feed)) == {9}


def test_golden() -> None:
    graph = pooled()
    run_pass(graph, RemovePadding())
    check(
        graph,
        """
        CHECK: %[[MASK:padding/mask]] = Expand(%attention_mask, %
        CHECK: %[[FLAT:padding/flat]] = Concat
        CHECK: %[[WHERE:padding/where]] = NonZero(%[[FLAT]])
        CHECK: %[[REAL:[^ ]+]] = Reshape(%[[WHERE]]
        CHECK: %padding/spread = Expand(%padding/places, %padding/sizes)
        CHECK: %[[ROWS:padding/rows]] = Gather(%{{.*}}, %[[REAL]])
        CHECK: %[[PACKED:[^ ]+]] = Gather(%x/rows, %[[ROWS]])
        CHECK: LayerNormalization(%[[PACKED]]
        CHECK: %m = MatMul(
        CHECK: %s = Add(%r, %[[PACKED]])
        CHECK: %h/packed = LayerNormalization(%s
        CHECK-NOT: Reshape(%h/rows
        CHECK: %[[SUM:pooling/sum]] = Scan(%padding/starts, %padding/ends)
        CHECK: %[[TOTAL:[^ ]+]] = Squeeze(%[[SUM]]
        CHECK: %y = Div(%[[TOTAL]], %c)
        """,
    )


BLOCK = "m = MatMul(x, w) r = Relu(m)"


def block(text: str, mask: str = "int64[B,S]", out: str = "float y", opset: int = 17) -> Graph:
    text = f"g (float[B,S,8] x, {mask} attention_mask) => ({out}) {{ {BLOCK} {text} }}"
    return parse(text, opset, w=normal(8, 8), second=np.array([1]))


ATTENTION = """
    kt = Transpose<perm = [0, 2, 1]>(r)
    qk = MatMul(r, kt) p = Softmax(qk) c = MatMul(p, r) v = MatMul(c, w) y = Relu(v)
"""


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            block("y = ReduceSum<keepdims = 0>(r, second)", out="float[B,8] y"),
            "ReduceSum 'ReduceSum:y' may read across positions",
        ),
        (block(ATTENTION, out="float[B,S,8] y"), "attention 'Softmax:p' has no mask"),
        (
            block("y = Relu(r)", mask="float[B,S]", out="float[B,S,8] y"),
            "attention_mask is float32: it may be additive",
        ),
    ],
)
def test_what_might_show_padding_to_a_real_position_is_refused(graph: Graph, reason: str) -> None:
    assert_refused(graph, RemovePadding(), reason)


def test_an_old_opset_is_refused() -> None:
    graph = block("y = Relu(r)", out="float[B,S,8] y", opset=11)
    assert_refused(graph, RemovePadding(), "opset 11 has no Max of integers, needs 12")


def test_graph_without_mask_is_none_of_its_business() -> None:
    graph = parse("g (float[B,S,8] x) => (float[B,S,8] y) { y = MatMul(x, w) }", w=normal(8, 8))
    assert run_pass(graph, RemovePadding()).skips == []


def several(kinds: str = "B,S") -> Graph:
    """Ids and kinds of tokens, whose embeddings are added, and attention under a mask."""
    text = f"""
    g (int64[B,S] ids, int64[{kinds}] kinds, int64[B,S] attention_mask) => (float[N,M,8] y) {{
        t = Gather(words, ids) k = Gather(types, kinds) e = Add(t, k)
        q = MatMul(e, w) kt = Transpose<perm = [0, 2, 1]>(q) s = MatMul(q, kt)
        f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, second) h = Sub(one, u) m = Mul(h, low)
        z = Add(s, m) p = Softmax<axis = -1>(z) c = MatMul(p, q) v = MatMul(c, w) y = Add(v, e)
    }}"""
    return parse(
        text,
        words=normal(64, 8),
        types=normal(2, 8, seed=1),
        w=normal(8, 8) / 3,
        second=np.array([1]),
        one=np.array(1, np.float32),
        low=np.array(-1e9, np.float32),
    )


ROWS = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("mask", "kinds", "named"),
    [
        (ROWS, (3, 4), "B,S"),
        (ROWS[:1], (3, 4), "B,S"),  # one row of the mask for all samples
        ([[1], [1], [1]], (3, 4), "B,S"),  # one column
        ([[1]], (3, 4), "B,S"),
        (ROWS, (1, 4), "C,R"),
        (ROWS, (3, 1), "C,R"),
        (ROWS[:1], (1, 1), "C,R"),
    ],
)
def test_inputs_of_one_row_or_column_are_for_all(
    mask: list[list[int]], kinds: tuple[int, int], named: str
) -> None:
    graph, rng = several(named), np.random.default_rng(0)
    feed = {
        "ids": rng.integers(0, 64, (3, 4)),
        "kinds": rng.integers(0, 2, kinds),
        "attention_mask": np.array(mask),
    }
    expected = outputs(graph, feed)["y"]
    run_pass(graph, RemovePadding())
    assert any(n.op == "NonZero" for n in graph.nodes)
    found = outputs(graph, feed)["y"]
    assert found.shape == expected.shape
    real = np.broadcast_to(np.array(mask) != 0, expected.shape[:2])
    np.testing.assert_allclose(found[real], expected[real], atol=ATOL)


@pytest.mark.parametrize("mask", [(3, 5), (3, 3), (2, 4), (1, 5), (0, 4)])
def test_masks_that_do_not_fit_are_errors(mask: tuple[int, int]) -> None:
    """As they are in the float model, and never answers for part of the samples."""
    feed = {
        "ids": np.ones((3, 4), np.int64),
        "kinds": np.ones((3, 4), np.int64),
        "attention_mask": np.ones(mask, np.int64),
    }
    graph = several()
    for _ in range(2):
        with pytest.raises(ModelError):
            outputs(graph, feed)
        run_pass(graph, RemovePadding())
