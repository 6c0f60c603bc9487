"""Made-up feeds have the declared types, the asked-for shapes, and values the graph can use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from qcompile.data.feeds import Feed
from qcompile.data.synthetic import synthetic_feeds, table_rows
from qcompile.errors import DataError
from qcompile.ir import Graph
from qcompile.ir.model_io.read_model import load
from qcompile.rewriting.testing import model_proto


def graph(text: str) -> Graph:
    return load(model_proto(text))


ENCODER = """g (int64[batch_size, sequence_length] input_ids, int64[batch_size, sequence_length]
attention_mask, int64[batch_size, sequence_length] token_type_ids) => (float[B, S, 2] y)
<float[5, 2] words = {0,1,2,3,4,5,6,7,8,9}, float[2, 2] types = {0,1,2,3}> {
  w = Gather(words, input_ids)
  t = Gather(types, token_type_ids)
  m = Cast<to: int = 1>(attention_mask)
  y = Add(w, t)
}"""


def one(
    text: str,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Feed:
    (feed,) = synthetic_feeds(graph(text), dims or {}, 1, 0, shapes=shapes)
    return feed


def shape_of(dims: str, dtype: str = "float") -> tuple[int, ...]:
    return one(f"g ({dtype}[{dims}] x) => ({dtype}[{dims}] y) {{ y = Identity(x) }}")["x"].shape


def test_encoder_feeds() -> None:
    feeds = synthetic_feeds(graph(ENCODER), {"batch_size": 4}, 3, seed=1)
    assert len(feeds) == 3
    for feed in feeds:
        assert {a.shape for a in feed.values()} == {(4, 128)}
        assert {a.dtype for a in feed.values()} == {np.dtype(np.int64)}
        assert set(np.unique(feed["input_ids"])) == set(range(5))
        assert (feed["attention_mask"] == 1).all() and not feed["token_type_ids"].any()


def test_the_seed_decides() -> None:
    made = [synthetic_feeds(graph(ENCODER), {}, 2, seed)[1]["input_ids"] for seed in (3, 3, 4)]
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


@pytest.mark.parametrize(
    ("dims", "dtype", "expected"),
    [
        ("batch, seq_len, 7", "float", (1, 128, 7)),
        ("N, 3, height, image_width", "float", (1, 3, 224, 224)),
        ("foo, bar", "float", (1, 1)),
        ("foo, bar", "int64", (1, 128)),
        ("?, ?", "int32", (1, 128)),
        ("?, ?", "float", (1, 1)),
        ("2, MaxLength", "float", (2, 128)),
    ],
)
def test_sizes_by_name(dims: str, dtype: str, expected: tuple[int, ...]) -> None:
    assert shape_of(dims, dtype) == expected


def test_a_dimension_has_one_size_everywhere_and_sums_add_up() -> None:
    proto = graph("g (float[s7] x, int64[N, s7] i, int64[N, s7] m) => (float[s7] y) { y = Neg(x) }")
    assert synthetic_feeds(proto, {}, 1, 0)[0]["x"].shape == (128,)
    for tensor in proto.inputs[2:]:
        tensor.shape = ["N", "past + s7"]
    dims = {"past": 6, "s7": 4}
    assert synthetic_feeds(proto, dims, 1, 0)[0]["m"].shape == (1, 10)


def test_shapes_size_the_dimensions_that_they_name() -> None:
    feed = one(ENCODER, shapes={"attention_mask": (2, 9)})
    assert {a.shape for a in feed.values()} == {(2, 9)}


def test_shape_of_an_unknown_rank_must_be_given() -> None:
    made = graph("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    made.inputs[0].shape = None
    with pytest.raises(DataError, match="input 'x' has no declared rank"):
        synthetic_feeds(made, {}, 1, 0)
    assert synthetic_feeds(made, {}, 1, 0, shapes={"x": (2, 3)})[0]["x"].shape == (2, 3)


@pytest.mark.parametrize(
    ("dims", "shapes", "said"),
    [
        ({"seq": 3}, {}, "no dimension .* named 'seq'; there are: batch_size, sequence_length"),
        ({}, {"ids": (1, 2)}, "no input .* named 'ids'; there are: input_ids, attention_mask"),
        ({"batch_size": -1}, {}, "dimension 'batch_size': found -1, expected 0 or more"),
        ({}, {"input_ids": (1, -2)}, "found a negative size"),
        ({}, {"input_ids": (1,)}, "shape 1 for input 'input_ids': found rank 1, expected 2"),
        ({"batch_size": 2}, {"input_ids": (1, 8)}, r"found 1 on axis 0 \(batch_size\), expected 2"),
    ],
)
def test_sizes_that_do_not_fit(
    dims: dict[str, int], shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        one(ENCODER, dims, shapes)


def test_fixed_dimensions_are_not_overruled() -> None:
    with pytest.raises(DataError, match="found 4 on axis 1, expected 3"):
        one("g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }", shapes={"x": (1, 4)})


@pytest.mark.parametrize(
    ("dtype", "name", "expected"),
    [
        ("int64", "x", {0, 1}),
        ("uint8", "x", {0, 1}),
        ("bool", "x", {True}),
        ("int32", "padding_mask", {1}),
        ("float", "attention_mask", {1.0}),
        ("int64", "segment_ids", {0}),
        ("int64", "token_type_ids", {0}),
    ],
)
def test_values_by_type_and_name(dtype: str, name: str, expected: set[object]) -> None:
    feed = one(f"g ({dtype}[64] {name}) => ({dtype}[64] y) {{ y = Identity({name}) }}")
    assert set(np.unique(feed[name]).tolist()) == expected


@pytest.mark.parametrize("dtype", ["float", "float16", "double", "bfloat16"])
def test_floats_are_standard_normal(dtype: str) -> None:
    text = f"g ({dtype}[4000] x) => ({dtype}[4000] y) {{ y = Identity(x) }}"
    made = graph(text)
    values = synthetic_feeds(made, {}, 1, 0)[0]["x"].astype(np.float64)
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1


def test_strings_cannot_be_made_up() -> None:
    with pytest.raises(DataError, match="input 'x' holds strings"):
        one("g (string[2] x) => (string[2] y) { y = Identity(x) }")


def rows_of(body: str, initializers: str = "float[5, 2] t = {0,1,2,3,4,5,6,7,8,9}") -> int | None:
    made = graph(f"g (int64[n] i, float[4] f) => (float y) <{initializers}> {{ {body} }}")
    return table_rows(made, made.inputs[0])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Gather(t, i)", 5),
        ("y = Gather<axis: int = 1>(t, i)", 2),
        ("y = Gather<axis: int = -1>(t, i)", 2),
        ("c = Cast<to: int = 6>(i) y = Gather(t, c)", 5),
        ("s = Constant<value = int64[2] {1, -1}>() c = Reshape(i, s) y = Gather(t, c)", 5),
        ("a = Gather(t, i) b = Gather<axis: int = 1>(t, i) y = Concat<axis: int = 0>(a, b)", 2),
        ("c = Add(i, i) y = Gather(t, c)", None),
        ("y = Gather(f, i)", None),  # a table that is computed
        ("y = Gather(i, i)", None),
        ("y = Cast<to: int = 1>(i)", None),
        ("s = Constant<value = int64[1] {2}>() y = Gather(i, s)", None),  # indexed, not an index
        ("y = Gather<axis: int = 7>(t, i)", None),
        ("y = Gather(i)", None),  # a damaged node
    ],
)
def test_rows_of_the_table(body: str, expected: int | None) -> None:
    assert rows_of(body) == expected


def test_rows_of_a_fused_embedding() -> None:
    tables = "float[3, 1] w = {1,2,3}, float[9, 1] p = {1,2,3,4,5,6,7,8,9}, float[2, 1] s = {1,2}"
    body = "y = com.microsoft.EmbedLayerNormalization(i, j, w, p, s)"
    made = graph(f"g (int32[b,n] i, int32[b,n] j) => (float y) <{tables}> {{ {body} }}")
    assert [table_rows(made, tensor) for tensor in made.inputs] == [3, 2]
    body = "y = com.microsoft.EmbedLayerNormalization(i, , w, p)"
    made = graph(f"g (int32[b,n] i) => (float y) <{tables}> {{ {body} }}")
    assert table_rows(made, made.inputs[0]) == 3


def test_rows_of_quantized_tables() -> None:
    names = "int8[3, 2] q = {0,1,2,3,4,5}, float s = {1}, int8 z = {0}"
    assert rows_of("t = DequantizeLinear(q, s, z) y = Gather(t, i)", names) == 3
    names = "uint8[3, 2] q = {0,1,2,3,4,5}, float[3, 1] s = {1, 1, 1}"
    body = "y = com.microsoft.GatherBlockQuantized<gather_axis: int = 0>(q, i, s)"
    assert rows_of(body, names) == 3
