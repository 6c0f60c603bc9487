"""An Einsum of two operands that is a matrix multiplication becomes one, at every size."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, is_op
from qcompile.passes.simplify.einsum_to_matmul import EinsumToMatmul
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)

# Sums of at most 24 products of standard normal values, whose partial sums are below 64 here, each
# rounded by 2^-24 of them, in another order.
ATOL = 24 * 64 * 2.0**-24
SIZES = {"d": 6, "h": 2, "s": 3, "e": 4}


def einsum(equation: str, x: str, w: str, more: str = "", **weights: Array) -> Graph:
    """Data with axes ``x`` by a constant with axes ``w``; axes that w lacks are symbolic."""
    dims = ", ".join(str(SIZES[a]) if a in w else a.upper() for a in x)
    kernel = normal(*(SIZES[a] for a in w))
    body = more or "y = Identity(p)"
    return parse(
        f"""g (float[{dims}] x) => (float y) {{
            p = Einsum<equation = "{equation}">(x, w) {body} }}""",
        w=kernel,
        **weights,
    )


def test_projections_of_attention_are_linear_layers() -> None:
    """As Keras writes them: with the bias in front of the Reshape, where it fuses."""
    graph = einsum("abd,dhs->abhs", "abd", "dhs", "y = Add(p, b)", b=normal(2, 3, seed=1))
    differential(graph, EinsumToMatmul(), atol=ATOL)
    check(
        graph,
        """CHECK: graph g
        CHECK: [[M:%[^ ]+]] = MatMul(%x, @w/matrix:{{.*}})
        CHECK-NEXT: [[A:%[^ ]+]] = Add([[M]], @b/joined:{{.*}})
        CHECK-NEXT: %y = Reshape([[A]], {{.*}}[0, 0, 2, 3])
        CHECK-NOT: Einsum""",
    )
    assert np.array_equal(graph.constants()["w/matrix"].values, normal(6, 2, 3).reshape(6, 6))


def test_scores_and_context_are_products_of_stacks() -> None:
    graph = parse(
        """g (float[B,S,H,D] q, float[B,T,H,D] k, float[B,T,H,D] v) => (float y) {
            s = Einsum<equation = "aecd,abcd->acbe">(k, q)
            y = Einsum<equation = "acbe,aecd->abcd">(s, v) }"""
    )
    feeds = [
        {"q": normal(b, s, h, 4), "k": normal(b, t, h, 4, seed=1), "v": normal(b, t, h, 4, seed=2)}
        for b, s, t, h in ((1, 1, 1, 1), (2, 5, 3, 2))
    ]  # fmt: skip
    differential(graph, EinsumToMatmul(), atol=ATOL, rtol=ATOL, feeds=feeds)
    check(
        graph,
        """CHECK: graph g
        CHECK-DAG: [[Q:%[^ ]+]] = Transpose(%q) {perm=[0, 2, 1, 3]}
        CHECK-DAG: [[K:%[^ ]+]] = Transpose(%k) {perm=[0, 2, 3, 1]}
        CHECK: [[S:%[^ ]+]] = MatMul([[Q]], [[K]])
        CHECK: = MatMul([[S]],
        CHECK-NOT: Einsum""",
    )


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("abd,de->abe", "abd", "de"),
        ("a b d, e d -> a b e", "abd", "ed"),
        ("abhs,hsd->abd", "abhs", "hsd"),
        ("adbh,hde->eab", "adbh", "hde"),
        ("...d,dh", "abd", "dh"),
        ("hab,hd", "hab", "hd"),
    ],
)
def test_constants_in_any_order(equation: str, x: str, w: str) -> None:
    graph = einsum(equation, x, w)
    before = [(n.op, n.name) for n in graph.nodes if is_op(n, "Einsum")]
    differential(graph, EinsumToMatmul(), atol=ATOL)
    assert [("Einsum", n.name) for n in graph.nodes if is_op(n, "MatMul")] == before


def test_the_constant_may_be_the_left_operand() -> None:
    graph = parse(
        """g (float[A,B,6] x) => (float y) { y = Einsum<equation = "hed,abd->abhe">(w, x) }""",
        w=normal(2, 4, 6),
    )
    differential(graph, EinsumToMatmul(), atol=ATOL)


def test_an_empty_batch_stays_empty() -> None:
    graph = einsum("abhs,hsd->abd", "abhs", "hsd")
    run_pass(graph, EinsumToMatmul())
    assert outputs(graph, {"x": np.zeros((0, 5, 2, 3), np.float32)})["y"].shape == (0, 5, 6)


def test_readers_of_one_constant_share_one_matrix() -> None:
    graph = parse(
        """g (float[A,B,6] x, float[A,B,6] z) => (float y, float u, float v) {
            y = Einsum<equation = "abd,dhe->abhe">(x, w)
            u = Einsum<equation = "abd,dhe->abhe">(z, w)
            v = Einsum<equation = "abd,hde->abhe">(z, t) }""",
        w=normal(6, 2, 4),
        t=normal(2, 6, 4),
    )
    differential(graph, EinsumToMatmul(), atol=ATOL)
    large = [n for n, c in graph.constants().items() if c.values.size == 48]
    assert large == ["w/matrix", "t/matrix"]


@pytest.mark.parametrize(
    "bias", [normal(1, 3), normal(2, 1), normal(3), normal(), normal(1, 2, 3), normal(2, 3)]
)
def test_biases_of_all_shapes(bias: Array) -> None:
    graph = einsum("abd,dhs->abhs", "abd", "dhs", "y = Add(b, p)", b=bias)
    differential(graph, EinsumToMatmul(), atol=ATOL)


def dynamic(equation: str, *dims: str) -> Graph:
    inputs = ", ".join(f"float[{d}] x{i}" for i, d in enumerate(dims))
    names = ", ".join(f"x{i}" for i in range(len(dims)))
    return parse(f'g ({inputs}) => (float y) {{ y = Einsum<equation = "{equation}">({names}) }}')


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (dynamic("aab,bc->ac", "A,A,B", "B,C"), "repeats within one operand"),
        (dynamic("abd,bc->ac", "A,B,D", "B,C"), "summed in one operand alone"),
        (dynamic("ab,ab->ab", "A,B", "A,B"), "no axis is summed"),
        (dynamic("ab,cd->abcd", "A,B", "C,D"), "no axis is summed"),
        (dynamic("abcd,efcd->abef", "A,B,C,D", "E,F,C,D"), "would have to be joined"),
        (dynamic("ab,bc,cd->ad", "A,B", "B,C", "C,D"), "it has 3 operands"),
        (dynamic("ab->ba", "A,B"), "it has 1 operands"),
        (dynamic("ab,bc->ac", "A,B", "1,C"), "size 1 may be broadcast"),
        (einsum("ahd,hde->ahe", "ahd", "hde"), "is a stack of matrices"),
        (einsum("abd,d->ab", "abd", "d"), "only summed"),
        (einsum("...d,d->...", "abd", "d"), "only summed"),
        (
            parse(
                """g (int32[A,B] x, int32[B,C] z) => (int32[A,C] y) {
                    y = Einsum<equation = "ab,bc->ac">(x, z) }"""
            ),
            "not known to be float32",
        ),
    ],
)
def test_it_refuses(graph: Graph, reason: str) -> None:
    assert_refused(graph, EinsumToMatmul(), reason)


def test_an_ellipsis_of_unknown_rank_is_left_alone() -> None:
    graph = parse(
        """g (float[A,6] x, int64[N] s) => (float y) {
            r = Reshape(x, s) y = Einsum<equation = "...d,de->...e">(r, w) }""",
        w=normal(6, 4),
    )
    assert_refused(graph, EinsumToMatmul(), "the rank of an operand with an ellipsis is not known")


def test_ellipses_of_both_operands_broadcast() -> None:
    graph = dynamic("...ab,...bc->...ac", "M,N,A,B", "M,N,B,C")
    feeds = [
        {"x0": normal(m, n, 2, 6), "x1": normal(m, k, 6, 4, seed=1)}
        for m, n, k in ((3, 2, 2), (3, 2, 1), (1, 1, 4))
    ]
    differential(graph, EinsumToMatmul(), atol=ATOL, feeds=feeds)


@pytest.mark.parametrize("seed", range(8))
def test_random_equations_are_as_numpy_computes_them(seed: int) -> None:
    """Axes of all kinds in random order: what is written, and what is refused, gives the same."""
    rng, written = np.random.default_rng(seed), 0
    for _ in range(12):
        kinds = ["left", "sum", "right", *rng.choice(["left", "sum", "right", "stack"], 2)]
        letters = dict(zip("abcde", rng.permutation(kinds), strict=True))
        sizes = {a: int(rng.integers(2, 5)) for a in letters}
        terms = [
            "".join(rng.permutation([a for a, k in letters.items() if k not in missing]))
            for missing in (("right",), ("left",), ("sum",))
        ]
        equation = "{},{}->{}".format(*terms)
        x, w = (normal(*(sizes[a] for a in t), seed=i) for i, t in enumerate(terms[:2]))
        dims = [",".join(f"N{a}" for a in t) for t in terms]
        constant = bool(rng.integers(2))
        other = "" if constant else f", float[{dims[1]}] w"
        text = f'float[{dims[2]}] y) {{ y = Einsum<equation = "{equation}">(x, w) }}'
        graph = parse(
            f"g (float[{dims[0]}] x{other}) => ({text}", 17, **({"w": w} if constant else {})
        )
        run_pass(graph, EinsumToMatmul())
        written += not any(is_op(n, "Einsum") for n in graph.nodes)
        got = outputs(graph, {"x": x} if constant else {"x": x, "w": w})["y"]
        np.testing.assert_allclose(got, np.einsum(equation, x, w), atol=ATOL, err_msg=equation)
    assert written > 0
