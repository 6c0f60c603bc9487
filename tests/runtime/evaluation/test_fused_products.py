"""Q/DQ nodes as ONNX Runtime fuses them: which two products of weights are added in int16.

Each filter has two large weights and zeros, and all data is 255. Exact and saturating sums differ
only if the two are neighbours for the kernel: on a processor that saturates that is its own order,
on others the emulated one.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompile.compiler.stages.saturation_check import IntegerSums
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.session import SessionOptions

Place = tuple[int, ...]  # channel of the group, position in the kernel


def is_same(model: onnx.ModelProto) -> bool:
    """The promise, after a check that outputs keep it and that it is not withheld for nothing."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.ones(shape, np.float32)}
    sums, options = IntegerSums(model), SessionOptions(threads=1)
    exact, saturating = (
        sums.runner(kind, options).run(feed)["y"] for kind in ("exact", "saturating")
    )
    assert sums.same == bool((exact == saturating).all())
    return sums.same


def planted(shape: Place, places: tuple[Place, Place]) -> Array:
    """int8 filters [outputs, channels of a group, *kernel] with two large weights each."""
    weights = np.zeros(shape, np.int8)
    for place in places:
        weights.reshape(shape[0], -1)[:, np.ravel_multi_index(place, shape[1:])] = 127
    return weights


def convolution(weights: Array, data: str, group: int = 1) -> onnx.ModelProto:
    """A convolution between Q/DQ nodes; ``data``: the type between the first two."""
    channels, *kernel = weights.shape[1:]
    zero = 0 if data == "uint8" else -128
    space = ",".join(str(size + 1) for size in kernel)
    result = ",".join("NMPQ"[: len(kernel) + 2])
    return model_proto(
        f"""g (float[1,{channels * group},{space}] x) => (float[{result}] y)
        <float s = {{0.003921569}}, {data} z = {{{zero}}}, float sw = {{0.01}}, int8 zw = {{0}},
         float sy = {{0.01}}> {{
          q = QuantizeLinear(x, s, z)
          d = DequantizeLinear(q, s, z)
          v = DequantizeLinear(w, sw, zw)
          c = Conv<group = {group}>(d, v)
          r = QuantizeLinear(c, sy, z)
          y = DequantizeLinear(r, sy, z) }}""",
        w=weights,
    )


@pytest.mark.parametrize("data", ["uint8", "int8"])  # int8 becomes uint8 on x86
@pytest.mark.parametrize(
    ("shape", "group", "places", "same"),
    [
        ((3, 4, 3, 3), 1, ((0, 0, 0), (1, 0, 0)), False),  # neighbours are channels ...
        ((3, 4, 3, 3), 1, ((1, 0, 0), (2, 0, 0)), True),
        ((3, 4, 3, 3), 1, ((0, 0, 0), (0, 0, 1)), True),  # ... not positions
        ((16, 4, 3, 3), 1, ((2, 2, 2), (3, 2, 2)), False),  # MlasConvSym
        ((16, 4, 3, 3), 1, ((0, 0, 0), (0, 0, 1)), True),
        ((16, 4, 1, 1), 1, ((0, 0, 0), (1, 0, 0)), False),
        ((16, 4, 1, 1), 1, ((1, 0, 0), (2, 0, 0)), True),
        ((5, 3, 1, 2), 1, ((2, 0, 0), (0, 0, 1)), False),  # from one position to the next
        ((5, 3, 1, 2), 1, ((0, 0, 0), (0, 0, 1)), True),
        ((5, 3, 3, 1), 1, ((2, 2, 0), (1, 2, 0)), True),  # 7 and 8 of 9 values
        ((6, 2, 2, 2), 2, ((0, 0, 1), (1, 0, 1)), False),
        ((6, 2, 2, 2), 2, ((0, 0, 0), (0, 0, 1)), True),
        ((6, 3, 2, 1), 2, ((2, 0, 0), (0, 1, 0)), False),
        ((6, 1, 2, 2), 3, ((0, 0, 0), (0, 0, 1)), False),  # one channel: positions
        ((6, 1, 2, 2), 3, ((0, 0, 1), (0, 1, 0)), True),
        ((3, 1, 2, 2), 3, ((0, 0, 0), (0, 0, 1)), True),  # depthwise
        ((16, 1, 3, 3), 16, ((0, 0, 0), (0, 0, 1)), True),  # MlasConvSymDepthwise
        ((4, 1, 1, 2), 1, ((0, 0, 0), (0, 0, 1)), False),
        ((4, 2, 3), 1, ((0, 1), (1, 1)), False),
        ((4, 3, 2), 1, ((2, 0), (0, 1)), False),
    ],
)
def test_neighbours_of_convolutions(
    shape: Place, group: int, places: tuple[Place, Place], same: bool, data: str
) -> None:
    assert is_same(convolution(planted(shape, places), data, group)) == same


MATMULS = {
    "m = MatMul(d, v)": (6, 3),
    "m = Gemm(d, v)": (6, 3),
    "m = Gemm<transB = 1>(d, v)": (3, 6),
    "t = Transpose(v) m = MatMul(d, t)": (3, 6),
}


def matmul(body: str, rows: tuple[int, int], data: str, requantized: bool) -> onnx.ModelProto:
    shape, zero = MATMULS[body], 0 if data == "uint8" else -128
    weights = np.zeros((6, 3), np.int8)
    weights[list(rows)] = 127
    end = "r = QuantizeLinear(m, sy, z) y = DequantizeLinear(r, sy, z)"
    return model_proto(
        f"""g (float[2,6] x) => (float[2,3] y)
        <float s = {{0.003921569}}, {data} z = {{{zero}}}, float sw = {{0.01}}, int8 zw = {{0}},
         float sy = {{0.01}}> {{
          q = QuantizeLinear(x, s, z)
          d = DequantizeLinear(q, s, z)
          v = DequantizeLinear(w, sw, zw) {body} {end if requantized else "y = Identity(m)"} }}""",
        w=weights if shape == (6, 3) else weights.T.copy(),
    )


@pytest.mark.parametrize("body", MATMULS)
@pytest.mark.parametrize("data", ["uint8", "int8"])
@pytest.mark.parametrize("requantized", [True, False])
def test_neighbours_of_matrix_multiplications(body: str, data: str, requantized: bool) -> None:
    assert not is_same(matmul(body, (2, 3), data, requantized))
    assert is_same(matmul(body, (1, 2), data, requantized))


def reasons(body: str, weights: Array) -> list[str]:
    """Why a model with filters behind DequantizeLinear has no guarantee."""
    quantized = "QuantizeLinear" in body
    model = model_proto(
        f"""g (float[1,4,2,2] x) => ({"uint8" if quantized else "float"}[N,M,P,Q] y)
        <float s = {{0.01}}, uint8 z = {{0}}, int8 zw = {{0}}, float low = {{0}},
         float high = {{1}}, float factor = {{0.7}}> {{
          q = QuantizeLinear(x, s, z)
          d = DequantizeLinear(q, s, z)
          v = DequantizeLinear(w, s, zw)
          {body} }}""",
        w=weights,
    )
    return [bound.reason for bound in IntegerSums(model).bounds]


LARGE, APART = np.full((4, 4, 1, 1), 127, np.int8), np.zeros((4, 4, 1, 1), np.int8)
APART[:, ::2] = 127


FUSIBLE = "this version of ONNX Runtime computes it in float, another may fuse its Q/DQ nodes"


@pytest.mark.parametrize(
    ("body", "weights", "found"),
    [
        # A bound in between, which another version may leave to the quantizer.
        ("c = Conv(d, v) r = Clip(c, low, high) y = QuantizeLinear(r, s, z)", LARGE, [FUSIBLE]),
        ("c = Conv(d, v) r = Clip(c, low, high) y = QuantizeLinear(r, s, z)", APART, []),
        # Without a quantizer behind it, and with other arithmetic on either side.
        ("y = Conv(d, v)", LARGE, []),
        ("c = Conv(d, v) r = Mul(c, factor) y = QuantizeLinear(r, s, z)", LARGE, []),
        ("e = Mul(d, factor) c = Conv(e, v) y = QuantizeLinear(c, s, z)", LARGE, []),
    ],
)
def test_what_another_version_may_fuse(body: str, weights: Array, found: list[str]) -> None:
    assert reasons(body, weights) == found


def test_no_promise_where_onnx_runtime_cannot_fuse() -> None:
    """An operator that is not here: nothing of the model runs, nor is it known what would."""
    text = """g (float[1,4] x) => (float[1,2] y)
        <float s = {{0.01}}, uint8 z = {{0}}, int8 zw = {{0}}> {{
          q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
          {weight} m = MatMul(d, v) y = own.Unheard(m) }}"""
    quantized = model_proto(
        text.format(weight="v = DequantizeLinear(w, s, zw)"), w=np.ones((4, 2), np.int8)
    )
    [bound] = IntegerSums(quantized).bounds
    assert bound.node == "the model" and "own:Unheard" in bound.reason
    plain = model_proto("g (float[4] x) => (float[4] y) { y = own.Unheard(x) }")
    assert IntegerSums(plain).same  # no integers, no sums of them
