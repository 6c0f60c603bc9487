"""Shapes by numbers: what symbols cannot say, and what stays unknown because values decide it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompile.ir import Graph, Shape
from qcompile.ir.analysis.shape_probing import (
    _PROBES,
    consistent_probes,
    equal_in,
    fixed_in,
    probed_shapes,
)
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import evaluate


def seen(graph: Graph, name: str) -> list[tuple[Shape | None, Shape | None]]:
    """The shape of x and of a tensor, in each probe."""
    return [(p.get("x"), p.get(name)) for p in probed_shapes(graph, evaluate)]


def test_a_reshape_that_merges_and_splits_heads() -> None:
    graph = parse(
        """g (float[B,S,8] x) => (float[B,S,8] y)
        <int64 i0 = {0}, int64 i1 = {1}, int64[1] two = {2}, int64[1] four = {4},
         int64[1] z = {0}> {
            s = Shape(x) b = Gather(s, i0) t = Gather(s, i1)
            bu = Unsqueeze(b, z) tu = Unsqueeze(t, z)
            heads = Concat<axis = 0>(bu, tu, two, four) r = Reshape(x, heads)
            p = Transpose<perm = [0, 2, 1, 3]>(r) back = Transpose<perm = [0, 2, 1, 3]>(p)
            flat = Shape(x) y = Reshape(back, flat)
        }"""
    )
    for x, r in seen(graph, "r"):
        assert x is not None and r == (*x[:2], 2, 4)
    for x, y in seen(graph, "y"):
        assert x == y


def test_slices_of_tables_by_length() -> None:
    """A table of positions cut to the sequence: symbols cannot say its length, numbers can."""
    table = ", ".join("0" for _ in range(64))
    graph = parse(
        f"""g (float[B,S,2] x) => (float[B,S,2] y)
        <float[1,32,2] table = {{{table}}}, int64[1] zero = {{0}}, int64[1] one = {{1}}> {{
            n = Shape<start = 1, end = 2>(x) cut = Slice(table, zero, n, one) y = Add(x, cut)
        }}"""
    )
    for x, cut in seen(graph, "cut"):
        assert x is not None and cut == (1, x[1], 2)


def test_sizes_that_values_decide_stay_symbolic() -> None:
    graph = parse(
        """g (float[B,S] x, int64[2] k) => (float[C,D] y) {
            n = NonZero(x) m = Cast<to = 1>(n) y = Reshape(m, k)
        }"""
    )
    for _, n in seen(graph, "n"):
        assert n is not None and not isinstance(n[1], int)
    for _, y in seen(graph, "y"):
        assert y is None or not any(isinstance(d, int) for d in y)


def test_the_graph_is_left_alone() -> None:
    graph = parse("g (float[B,4] x) => (int64[2] y) { s = Shape(x) y = Abs(s) }")
    probed_shapes(graph, evaluate)
    assert [n.op for n in graph.nodes] == ["Shape", "Abs"]
    assert list(graph.inputs[0].shape) == ["B", 4]


@pytest.mark.parametrize("count", [3, 60])
def test_no_two_dimensions_get_the_same_number(count: int) -> None:
    """A decoder has dozens of unnamed dimensions, for past keys and values."""
    ends = [onnx.helper.make_tensor_value_info(f"x{i}", 1, [None]) for i in range(count)]
    result = onnx.helper.make_tensor_value_info("y", 1, [None])
    node = onnx.helper.make_node("Concat", [e.name for e in ends], ["y"], axis=0)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ends, [result]), ir_version=8
    )
    for probe in probed_shapes(from_proto(model), evaluate)[:2]:
        assert len({probe[e.name] for e in ends}) == count


def test_probes_are_primes_but_for_the_round_of_ones() -> None:
    *primes, ones = _PROBES
    assert ones == (1,)
    for sizes in primes:
        assert len(set(sizes)) == len(sizes) > 100
        assert all(n % d for n in sizes for d in range(2, n))


def test_a_quotient_is_probed_where_it_varies() -> None:
    graph = parse(
        """g (float[B,1,H,W] x) => (float[B,1,M,N] y) {
            y = MaxPool<kernel_shape = [16, 16], strides = [16, 16]>(x)
        }"""
    )
    rows = [y[2] for _, y in seen(graph, "y") if y is not None]
    assert len({*rows}) > 2 and max(int(n or 0) for n in rows) > 50


@pytest.mark.parametrize("rows", [64, 512])
def test_no_probe_is_longer_than_a_table_of_positions(rows: int) -> None:
    graph = parse(
        """g (float[B,S,2] x) => (float[B,S,2] y) {
            n = Shape<start = 1, end = 2>(x) rows = Slice(table, zero, n, one) y = Add(x, rows)
        }""",
        table=normal(1, rows, 2),
        zero=np.array([0]),
        one=np.array([1]),
    )
    shapes = seen(graph, "y")
    lengths = [int(x[1] or 0) for x, _ in shapes if x is not None]
    assert rows / 2 < max(lengths) <= rows and all(x == y for x, y in shapes)


def test_ones_prove_nothing() -> None:
    assert equal_in([(1, 1), (7, 7), (13, 13)]) and not equal_in([(1, 1), (7, 7), (7, 7)])
    assert not equal_in([(1, 1), (7, 7), (13, 14)])
    assert fixed_in([4, 4, 4]) == 4
    assert fixed_in([1, 1, 1]) is None is fixed_in([4, 4, 5]) is fixed_in([]) is fixed_in(["n"])


WINDOWS = """g (float[B,H,8] x) => (float[N,4,8] y) {
    h = Shape<start = 1, end = 2>(x) b = Shape<start = 0, end = 1>(x) rows = Div(h, four)
    to = Concat<axis = 0>(b, rows, four, eight) windows = Reshape(x, to) y = Reshape(windows, flat)
}"""


def test_windows_are_probed_at_multiples_of_their_size() -> None:
    """No prime is one; what small primes seem to say is then no evidence."""
    flat = np.array([-1, 4, 8])
    graph = parse(WINDOWS, four=np.array([4]), eight=np.array([8]), flat=flat)
    probes = consistent_probes(graph, evaluate)
    heights = [int(p["x"][1] or 0) for p in probes]
    assert len({*heights}) == 3 and all(h % 4 == 0 for h in heights)
    assert all(p["windows"][1] == h // 4 for p, h in zip(probes, heights, strict=True))


def test_a_model_that_takes_no_probe_has_no_evidence() -> None:
    graph = parse(
        "g (float[B,H] x) => (float[B,H] y) { y = Add(x, w) }", w=np.zeros((1, 7), np.float32)
    )
    graph.inputs[0].shape = ["B", "H"]
    assert consistent_probes(graph, evaluate) == []
    assert len(probed_shapes(graph, evaluate)) == len(_PROBES)
