"""Normalization of inference, and constant factors and sums, move into the weights before them."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.simplify.fold_batchnorm import FoldBatchnorm
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass

F32 = np.float32
# Both forms sum at most 36 products and scale them: about 40 roundings by 2^-24 of values below 64.
ATOL = 40 * 2.0**-24 * 64
NORMALIZED = "y = BatchNormalization(c, g, h, m, v)"


def convolution(
    body: str = f"c = Conv(x, w, b) {NORMALIZED}",
    outputs: str = "float[B,4,N,N] y",
    opset: int = 17,
    data: str = "float[B,3,8,8] x",
    **changed: Array,
) -> Graph:
    weights: dict[str, Array] = {
        "w": normal(4, 3, 3, 3),
        "b": normal(4),
        "g": 1 + normal(4, seed=1) / 4,
        "h": normal(4, seed=2),
        "m": normal(4, seed=3),
        "v": np.abs(normal(4, seed=4)) + F32(0.5),
        "k": normal(4, 1, 1, seed=5),
        "s": np.array(0.5, F32),
        **changed,
    }
    return parse(f"g ({data}) => ({outputs}) {{ {body} }}", opset, **weights)


@pytest.mark.parametrize(
    "body",
    [
        f"c = Conv(x, w, b) {NORMALIZED}",
        f"c = Conv(x, w) {NORMALIZED}",
        "c = Conv(x, w, b) y = BatchNormalization<epsilon = 0.1>(c, g, h, m, v)",
        "c = Conv(x, w, b) y = Mul(c, k)",
        "c = Conv(x, w, b) y = Add(s, c)",
        "c = Conv(x, w) d = Mul(c, s) e = Add(d, k) y = BatchNormalization(e, g, h, m, v)",
    ],
)
def test_scale_and_shift_move_into_the_convolution(body: str) -> None:
    graph = convolution(body)
    differential(graph, FoldBatchnorm(), atol=ATOL)
    check(graph, "CHECK: %y = Conv(%x, @w/folded{{.*}}folded{{.*}})\nCHECK-NOT: {{%\\S+ = }}")


def test_groups_and_one_dimension() -> None:
    graph = convolution(
        f"c = Conv<group = 2>(x, w, b) {NORMALIZED}",
        "float[B,4,N] y",
        data="float[B,4,9] x",
        w=normal(4, 2, 3),
    )
    differential(graph, FoldBatchnorm(), atol=ATOL)
    check(graph, "CHECK: %y = Conv(\nCHECK-NOT: {{%\\S+ = }}")


def test_a_transposed_convolution_counts_its_outputs_second() -> None:
    graph = convolution(f"c = ConvTranspose(x, w, b) {NORMALIZED}", w=normal(3, 4, 3, 3))
    differential(graph, FoldBatchnorm(), atol=ATOL)
    check(graph, "CHECK: %y = ConvTranspose(\nCHECK-NOT: {{%\\S+ = }}")


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)], ids=["plain", "transB"])
def test_gemm(shape: tuple[int, int]) -> None:
    attributes = "<transB = 1>" if shape == (4, 3) else ""
    body = f"c = Gemm{attributes}(x, w, b) {NORMALIZED}"
    graph = convolution(body, "float[B,4] y", data="float[B,3] x", w=normal(*shape))
    differential(graph, FoldBatchnorm(), atol=ATOL)
    check(graph, "CHECK: %y = Gemm(\nCHECK-NOT: {{%\\S+ = }}")


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            convolution(
                f"c = Conv(x, w, b) {NORMALIZED} z = Conv(x, w)",
                "float[B,4,N,N] y, float[B,4,N,N] z",
            ),
            "'w' is shared",
        ),
        (
            convolution(
                f"c = Conv(x, w, b) {NORMALIZED} z = Neg(c)", "float[B,4,N,N] y, float[B,4,N,N] z"
            ),
            "other readers",
        ),
        (
            convolution(f"i = Identity(w) c = Conv(x, i, b) {NORMALIZED}"),
            "not a float32 constant",
        ),
        (
            convolution(
                "c = Conv(x, w, b) y, o, p = BatchNormalization<training_mode = 1>(c, g, h, m, v)"
            ),
            "as in training",
        ),
        (
            convolution(f"n = Neg(h) c = Conv(x, w) {NORMALIZED.replace(' h', ' n')}"),
            "its parameters are not float32 constants",
        ),
        (convolution(v=np.full(4, -1, F32)), "not finite"),
        (convolution("c = Conv(x, w) y = Mul(c, k)", k=normal(6)), "one value per channel"),
        (
            convolution(
                "c = Conv(x, w) y = Add(c, k)", "float[1,B,4,N,N] y", k=normal(1, 1, 4, 1, 1)
            ),
            "one value per channel",
        ),
        (
            convolution(
                f"c = ConvTranspose<group = 2>(x, w) {NORMALIZED}",
                data="float[B,4,8,8] x",
                w=normal(4, 2, 3, 3),
            ),
            "has groups",
        ),
        (
            convolution(
                f"c = Gemm<alpha = 0.5>(x, w, b) {NORMALIZED}",
                "float[B,4] y",
                data="float[B,3] x",
                w=normal(3, 4),
            ),
            "alpha, beta",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_folded_stays(graph: Graph, reason: str) -> None:
    assert_refused(graph, FoldBatchnorm(), reason)


def test_other_products_are_no_refusal() -> None:
    graph = convolution("d = Mul(x, s) c = Conv(d, w) y = Add(c, c)")
    assert run_pass(graph, FoldBatchnorm()).skips == []
