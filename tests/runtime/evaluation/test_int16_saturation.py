"""Sums of products as x86 without VNNI adds them: emulated, bounded, and seen."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.evaluation.int16_saturation import (
    IntegerProduct,
    bound,
    exact_on_all,
    linears,
    observe,
    saturated_product,
)

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
EXTREME = st.sampled_from([-128, -127, -65, -64, 0, 1, 63, 64, 65, 127])
LEVEL = st.sampled_from([0, 1, 127, 128, 254, 255])


def linear(weight: Array) -> IntegerProduct:
    return IntegerProduct("n", "x", "w", weight)


def naive(left: Array, weight: Array) -> Array:
    """vpmaddubsw and vpmaddwd, one sum at a time."""
    result = np.zeros((len(left), weight.shape[1]), np.int64)
    for i, j in np.ndindex(*result.shape):
        products = [int(a) * int(w) for a, w in zip(left[i], weight[:, j], strict=True)]
        pairs = [sum(products[k : k + 2]) for k in range(0, len(products), 2)]
        result[i, j] = sum(min(max(p, -(2**15)), 2**15 - 1) for p in pairs)
    return result


@st.composite
def operands(draw: st.DrawFn, weights: st.SearchStrategy[int] = EXTREME) -> tuple[Array, Array]:
    rows, inner = draw(SHAPES)
    columns = draw(st.integers(1, 4))
    left = draw(hnp.arrays(np.uint8, (rows, inner), elements=LEVEL))
    return left, draw(hnp.arrays(np.int8, (inner, columns), elements=weights))


@given(operands())
def test_the_emulation_is_the_instruction(pair: tuple[Array, Array]) -> None:
    assert (saturated_product(*pair) == naive(*pair)).all()


@given(operands())
def test_a_bound_of_none_is_a_promise(pair: tuple[Array, Array]) -> None:
    left, weight = pair
    exact = left.astype(np.int64) @ weight.astype(np.int64)
    same = (saturated_product(left, weight) == exact).all()
    assert same or bound(linear(weight)).can > 0
    assert same or (observe(linear(weight), left).did or 0) > 0


@given(operands(st.integers(-64, 64)))
def test_seven_bits_never_saturate(pair: tuple[Array, Array]) -> None:
    left, weight = pair
    assert bound(linear(weight)).can == 0
    assert (saturated_product(left, weight) == left.astype(np.int64) @ weight).all()


@pytest.mark.parametrize(
    ("weight", "can"),
    [
        ([[64], [64]], 0),
        ([[64], [65]], 1),  # 255 · 129 = 32895
        ([[-64], [-64]], 0),  # -32640
        ([[-64], [-65]], 1),
        ([[127], [-127]], 0),
        ([[64], [1], [65]], 0),  # the large ones are no neighbours
    ],
)
def test_the_bound_is_tight(weight: list[list[int]], can: int) -> None:
    found = np.array(weight, np.int8)
    left = np.full((1, len(found)), 255, np.uint8)
    assert bound(linear(found)).can == can
    assert (observe(linear(found), left).did == 1) == (can == 1)


def convolution(kernel: Array, group: int = 1) -> onnx.ModelProto:
    """QLinearConv of 1x1 or larger filters, int8 [outputs, channels of a group, height, width]."""
    return model_proto(
        f"""g (uint8[1,C,H,W] x, uint8 z, int8 zw, float s) => (uint8[1,{len(kernel)},P,Q] y)
        {{ y = QLinearConv<group = {group}>(x, s, z, w, s, zw, s, z) }}""",
        w=kernel,
    )


@pytest.mark.parametrize(
    ("kernel", "can"),
    [
        ([[[127]], [[127]], [[-5]], [[0]]], 1),  # channels of one position, both large
        ([[[127]], [[-5]], [[127]], [[0]]], 0),  # channels 0 and 2 are not side by side
        ([[[127, 127]], [[0, 0]]], 0),  # one channel at two positions: position outermost
        ([[[127, 1]], [[127, 1]]], 1),
    ],
)
def test_filters_are_summed_position_by_position(kernel: list[list[list[int]]], can: int) -> None:
    (found,) = linears(convolution(np.array([kernel], np.int8)))
    assert bound(found).can == can


def test_a_depthwise_convolution_adds_in_int32() -> None:
    kernel = np.full((3, 1, 2, 2), 127, np.int8)
    assert list(linears(convolution(kernel, group=3))) == []
    assert bound(next(linears(convolution(kernel)))).can == 6  # one channel read by three filters


def test_what_was_seen_is_counted() -> None:
    weight = np.full((4, 2), 127, np.int8)
    left = np.array([[255, 255, 0, 0], [1, 1, 1, 1], [0, 255, 255, 0]], np.uint8)
    found = observe(linear(weight), left)
    assert (found.can, found.pairs, found.did, found.sums) == (4, 4, 2, 12)
    signed = observe(linear(weight), left.astype(np.int8))
    assert (signed.can, signed.did) == (0, None)
    assert exact_on_all([signed]) and not exact_on_all([found])


def test_products_of_data_are_seen_batch_by_batch() -> None:
    left = np.full((2, 1, 3, 2), 255, np.uint8)
    right = np.full((2, 1, 2, 5), 100, np.int8)
    right[1] = 1
    found = observe(IntegerProduct("n", "a", "b", None), left, right)
    assert (found.did, found.sums) == (15, 30)


@pytest.mark.parametrize(
    ("left", "right", "sums"),
    [((4,), (4, 2), 4), ((3, 4), (4,), 6), ((3, 4), (5, 4, 2), 60), ((0, 3, 4), (4, 2), 0)],
)
def test_operands_of_other_ranks(left: tuple[int, ...], right: tuple[int, ...], sums: int) -> None:
    operands = np.zeros(left, np.uint8), np.ones(right, np.int8)
    found = observe(IntegerProduct("n", "a", "b", None), *operands)
    assert (found.did, found.sums) == (0, sums)


def test_products_of_a_model_are_found() -> None:
    model = model_proto(
        """g (uint8[2,4] a, int8[4,2] k)
            => (float[2,2] y, float[2,2] z, int32[2,2] i, float[2,3] f, int32[2,2] m)
        <int8[4,2] w = {1,2,3,4,5,6,7,8}, float s = {1}, uint8 z0 = {0},
         int8[3,4] t = {1,2,3,4,5,6,7,8,9,10,11,12}, int8 sz = {0}>
        { y = com.microsoft.MatMulIntegerToFloat(a, w, s, s, z0)
          z = com.microsoft.MatMulIntegerToFloat(a, k, s, s, z0)
          i = MatMulInteger(a, w, z0)
          f = com.microsoft.QGemm<transB = 1>(a, s, z0, t, s, sz)
          m = MatMulInteger(k, w) }"""
    )
    found = list(linears(model))
    assert [(x.left, x.right) for x in found] == [("a", "w"), ("a", "k"), ("a", "w"), ("a", "t")]
    shapes = [None if x.weight is None else x.weight.shape for x in found]
    assert shapes == [(4, 2), None, (4, 2), (4, 3)]


RECURRENT = """g (float[3,1,4] x) => (float[3,1,1,2] y)
<float[1] s = {0.01}, int8[1] z = {0}> {
  y = com.microsoft.DynamicQuantizeLSTM<hidden_size = 2>(x, w, r, , , , , , s, z, s, z) }"""


def test_both_weights_of_a_recurrent_layer_are_found() -> None:
    levels = {"w": np.full((1, 4, 8), 1, np.int8), "r": np.full((1, 2, 8), 127, np.int8)}
    model = model_proto(RECURRENT, **levels)
    found = list(linears(model))
    assert [(x.left, x.right) for x in found] == [("", "w"), ("", "r")]
    assert [bound(x).can for x in found] == [0, 8]


@pytest.mark.parametrize(
    ("data", "filters", "right"), [("uint8", "int8", []), ("int8", "uint8", ["x"])]
)
def test_filters_of_conv_integer_are_on_the_left(data: str, filters: str, right: list[str]) -> None:
    model = model_proto(
        f"""g ({data}[1,2,5,5] x) => (int32[1,1,5,5] y) <{filters}[1,2,1,1] k = {{9, 9}}>
        {{ y = ConvInteger(x, k) }}"""
    )
    assert [x.right for x in linears(model)] == right


@pytest.mark.parametrize(("mover", "can"), [("Split", 0), ("Relu", 1)])
def test_bounds_of_data_are_followed_through_movers(mover: str, can: int) -> None:
    model = model_proto(
        f"""g (uint8[2,4] a, int8[4,2] b) => (int32[2,2] y) <int8 l = {{-64}}, int8 h = {{64}}>
        {{ c = Clip(b, l, h) d = {mover}(c) y = MatMulInteger(a, d) }}"""
    )
    assert [bound(x).can for x in linears(model)] == [can]


def reasons(body: str) -> list[str]:
    """Why the products of a graph, as it is, have no better bound."""
    model = model_proto(
        f"""g (uint8[2,4] a, int8[4,4] b) => (float[2,4] y)
        <float s = {{1}}, uint8 z = {{0}}, int8 o = {{0}}> {{
          d = DequantizeLinear(a, s, z) {body} }}""",
        w=np.array([[64, 0, 64, 0]] * 4, np.int8).T.copy(),  # neighbours of rows, not of columns
    )
    return [found.reason for found in map(bound, linears(model)) if found.can]


FUSIBLE = "this version of ONNX Runtime computes it in float, another may fuse its Q/DQ nodes"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("v = DequantizeLinear(w, s, o) y = MatMul(d, v)", []),
        ("v = DequantizeLinear(w, s, o) y = Gemm(d, v)", []),
        # Its own order of rows and columns, and an order that is not followed.
        ("v = DequantizeLinear(w, s, o) y = com.microsoft.FusedMatMul(d, v)", []),
        ("v = DequantizeLinear(b, s, o) y = MatMul(d, v)", [FUSIBLE]),
        ("v = DequantizeLinear(a, s, z) y = MatMul(d, v)", []),  # uint8 by uint8
        ("y = own.Product(a, b)", ["how own.Product adds products of integers is not known"]),
        ("y = own.Product(a, w)", ["how own.Product adds products of integers is not known"]),
        ("y = own.Product(a)", []),
        (
            "y = com.microsoft.QMoE(d, d, a, s, , a, s)",
            ["how com.microsoft.QMoE adds products of integers is not known"],
        ),
        (
            "i = MatMulInteger(a, b) y = Cast<to = 1>(i)",
            ["its int8 operand is computed, so that any value is possible"],
        ),
    ],
)
def test_what_is_not_known_has_its_reason(body: str, found: list[str]) -> None:
    assert reasons(body) == found


@pytest.mark.parametrize(("mover", "found"), [("Transpose", [FUSIBLE]), ("Identity", [FUSIBLE])])
def test_moved_weights_may_have_any_neighbours(mover: str, found: list[str]) -> None:
    large = model_proto(
        f"""g (uint8[2,4] a) => (float[2,4] y) <float s = {{1}}, uint8 z = {{0}}, int8 o = {{0}}> {{
          d = DequantizeLinear(a, s, z) v = DequantizeLinear(w, s, o) t = {mover}(v)
          y = MatMul(d, t) }}""",
        w=np.array([[65, 0, 65, 0]] * 4, np.int8).T.copy(),
    )
    assert [bound(x).reason for x in linears(large)] == found
