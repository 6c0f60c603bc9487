"""Computed shapes become constants wherever inference proves what they are."""

from __future__ import annotations

import numpy as np

from qcompile.passes.simplify.fold_shapes import FoldShapes
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass

ZERO, ONE = np.array(0), np.array(1)
# [batch, sequence] of x as two vectors of one element, the way exporters write it.
DIMS = """
    s = Shape(x)
    d0 = Gather<axis = 0>(s, zero)
    d1 = Gather<axis = 0>(s, one)
    v0 = Unsqueeze(d0, axes)
    v1 = Unsqueeze(d1, axes)
"""
ARE_DIMS = {"zero": ZERO, "one": ONE, "axes": np.array([0])}


def test_head_split_keeps_batch_and_sequence_by_zero() -> None:
    graph = parse(
        f"""g (float[B,S,8] x) => (float[B,S,2,4] y) {{
            {DIMS}
            shape = Concat<axis = 0>(v0, v1, heads) y = Reshape(x, shape) }}""",
        heads=np.array([2, 4]),
        **ARE_DIMS,
    )
    differential(graph, FoldShapes(), atol=0)  # exact
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %y = Reshape(%x, @shape/static:i64[4]=[0, 0, 2, 4])
        CHECK-NOT: =
        """,
    )


def test_a_product_of_dimensions_becomes_minus_one() -> None:
    graph = parse(
        f"""g (float[B,S,8] x) => (float[R,8] y) {{
            {DIMS}
            n = Mul(v0, v1) shape = Concat<axis = 0>(n, width) y = Reshape(x, shape) }}""",
        width=np.array([8]),
        **ARE_DIMS,
    )
    differential(graph, FoldShapes(), atol=0)
    check(graph, "CHECK: %y = Reshape(%x, @shape/static:i64[2]=[-1, 8])")


def test_a_dimension_that_the_input_does_not_have() -> None:
    """[N] to [1, N]: there is no second dimension to keep by 0."""
    graph = parse(
        """g (float[N] x) => (float[1,N] y) {
            s = Shape(x)
            shape = Concat<axis = 0>(one, s)
            y = Reshape(x, shape)
        }""",
        one=np.array([1]),
    )
    differential(graph, FoldShapes(), atol=0)
    check(graph, "CHECK: %y = Reshape(%x, @shape/static:i64[2]=[1, -1])")


def test_probes_see_what_symbols_do_not() -> None:
    """(2 S) / 2 is S, and (S - S) + 4 is 4, in every probe of the sizes."""
    graph = parse(
        f"""g (float[B,S,8] x) => (float[B,S,4,2] y) {{{DIMS}twice = Mul(v1, two)
            same = Div(twice, two)
            none = Sub(v1, v1)
            heads = Add(none, four)
            shape = Concat<axis = 0>(v0, same, heads, two)
            y = Reshape(x, shape)
        }}""",
        two=np.array([2]),
        four=np.array([4]),
        **ARE_DIMS,
    )
    differential(graph, FoldShapes(), atol=0)
    check(graph, "CHECK: %y = Reshape(%x, @shape/static:i64[4]=[0, 0, 4, 2])")


PATCHES = """g (float[B,3,H,W] x) => (float[B,4,N] y) {
    c = Conv<kernel_shape = [16, 16], strides = [16, 16]>(x, w)
    s = Shape(c) two = Slice(s, zero, end, zero) shape = Concat<axis = 0>(two, rest)
    y = Reshape(c, shape)
}"""


def test_patches_of_images_of_any_size() -> None:
    """Images of 16 to 31 rows have one row of patches: what holds for these proves nothing."""
    weights = {"zero": np.array([0]), "end": np.array([2]), "rest": np.array([-1])}
    graph = parse(PATCHES, w=normal(4, 3, 16, 16), **weights)
    run_pass(graph, FoldShapes())
    check(graph, "CHECK: %y = Reshape(%c, @shape/static:i64[3]=[0, 4, -1])")


def test_a_constant_shape_stays_as_it_is() -> None:
    graph = parse(
        "g (float[B,S,8] x) => (float[R,8] y) { y = Reshape(x, shape) }", shape=np.array([-1, 8])
    )
    run_pass(graph, FoldShapes())
    check(graph, "CHECK: %y = Reshape(%x, @shape:i64[2]=[-1, 8])")


def test_an_expansion_that_does_something_stays() -> None:
    graph = parse(
        """g (float[B,1,8] x, float[B,S,8] z) => (float[B,S,8] y) {
            s = Shape(z)
            e = Expand(x, s)
            y = Add(e, z)
        }"""
    )
    ctx = run_pass(graph, FoldShapes())
    assert not ctx.skips
    check(graph, "CHECK: %e = Expand(%x, %s)")


def test_two_readers_of_one_computed_shape() -> None:
    graph = parse(
        f"""g (float[B,S,8] x) => (float[B,S,2,4] y, float[B,S,2,4] z) {{
            {DIMS}
            shape = Concat<axis = 0>(v0, v1, heads)
            n = Neg(x)
            y = Reshape(x, shape)
            z = Reshape(n, shape)
        }}""",
        heads=np.array([2, 4]),
        **ARE_DIMS,
    )
    differential(graph, FoldShapes(), atol=0)
    check(
        graph,
        """
        CHECK-DAG: %y = Reshape(%x, @shape/static{{.*}}=[0, 0, 2, 4])
        CHECK-DAG: %z = Reshape(%n, @shape/static{{.*}}=[0, 0, 2, 4])
        CHECK-NOT: Concat
        """,
    )


def test_a_fixed_dimension_becomes_a_number() -> None:
    graph = parse(
        """g (float[B,S,16] x) => (float[B,S,16] y) {
            s = Shape(x)
            d = Gather<axis = 0>(s, last)
            f = Cast<to = 1>(d)
            y = Div(x, f)
        }""",
        last=np.array(-1),
    )
    differential(graph, FoldShapes(), atol=0)
    check(
        graph,
        """
        CHECK: %f = Cast(@d/dims:i64[]=16)
        CHECK: %y = Div(%x, %f)
        CHECK-NOT: Shape(
        """,
    )


def test_a_slice_of_the_shape_and_start_and_end() -> None:
    graph = parse(
        """g (float[B,6,16] x) => (int64[1] a, int64[2] b) {
            s = Shape(x)
            p = Slice(s, from, to)
            q = Shape<start = 1>(x)
            a = Neg(p)
            b = Neg(q)
        }""",
        **{"from": np.array([1]), "to": np.array([2])},
    )
    differential(graph, FoldShapes(), atol=0)
    check(
        graph,
        """
        CHECK-DAG: %a = Neg(@p/dims:i64[1]=[6])
        CHECK-DAG: %b = Neg(@q/dims:i64[2]=[6, 16])
        CHECK-NOT: Shape(
        """,
    )


def test_reshape_and_expand_to_the_shape_it_has_already() -> None:
    graph = parse(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            s = Shape(x)
            r = Reshape(x, s)
            e = Expand(r, s)
            y = Relu(e)
        }"""
    )
    differential(graph, FoldShapes(), atol=0)
    check(
        graph,
        """
        CHECK: graph g
        CHECK-NEXT: %y = Relu(%x)
        CHECK-NOT: =
        """,
    )


def test_allowzero_goes_since_zero_now_means_as_the_input() -> None:
    graph = parse(
        f"""g (float[B,S,8] x) => (float[B,S,2,4] y) {{
            {DIMS}
            shape = Concat<axis = 0>(v0, v1, heads) y = Reshape<allowzero = 1>(x, shape) }}""",
        heads=np.array([2, 4]),
        **ARE_DIMS,
    )
    differential(graph, FoldShapes(), atol=0)
    check(graph, "CHECK: %y = Reshape(%x, @shape/static:i64[4]=[0, 0, 2, 4]){{$}}")


def test_a_graph_output_keeps_its_name() -> None:
    """y is x itself: the Reshape must stay to carry the name; the shape is an output too."""
    graph = parse(
        """g (float[B,S,8] x) => (float[B,S,8] y, int64[3] s) {
            s = Shape(x)
            y = Reshape(x, s)
        }"""
    )
    differential(graph, FoldShapes(), atol=0)
    check(
        graph,
        """
        CHECK: -> (%y, %s)
        CHECK-DAG: %s = Shape(%x)
        CHECK-DAG: %y = Reshape(%x, @s/static:i64[3]=[0, 0, 8])
        """,
    )


def test_a_subgraph_reads_the_reshaped_tensor() -> None:
    graph = parse(
        """g (bool c, float[B,S,8] x) => (float[B,S,8] y) {
            s = Shape(x)
            n = Neg(x)
            r = Reshape(n, s)
            y = If (c) <
                then_branch = yes () => (float[B,S,8] p) { p = Abs(r) },
                else_branch = no () => (float[B,S,8] q) { q = Exp(r) }
            >
        }"""
    )
    feeds = [{"c": np.array(c), "x": normal(2, 3, 8)} for c in (True, False)]
    differential(graph, FoldShapes(), atol=0, feeds=feeds)
    check(graph, "CHECK-NOT: Reshape")


def test_refuses_two_dimensions_that_only_the_feed_knows() -> None:
    graph = parse(
        """g (float[B,S,8] x, int64[2] shape) => (float[P,Q] y) {
            y = Reshape(x, shape)
        }"""
    )
    assert_refused(graph, FoldShapes(), "two or more dimensions")


def test_refuses_an_unknown_rank() -> None:
    graph = parse(
        """g (float[B,S,8] x, int64[R] shape) => (float y) {
            r = Reshape(x, shape)
            y = ReduceSum<keepdims = 0>(r)
        }"""
    )
    assert_refused(graph, FoldShapes(), "rank")


def test_refuses_an_input_of_unknown_rank() -> None:
    graph = parse(
        "g (float[B,S,8] x) => (float[B,S,8] y) { a = acme.Op(x) s = Shape(x) y = Reshape(a, s) }"
    )
    assert_refused(graph, FoldShapes(), "rank")


def test_leaves_graphs_without_shapes_alone() -> None:
    graph = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    ctx = run_pass(graph, FoldShapes())
    assert not ctx.skips
