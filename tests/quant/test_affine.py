"""Quantization arithmetic: its laws as properties, and bit for bit against ONNX Runtime."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qcompile.quant import Floats, QParams, QSpec, Range, dequantize, qparams, quantize, sqnr_db
from qcompile.quant.affine import quantized_sqnr_db, weight_range
from qcompile.quant.types import DType
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.session import Session

DTYPES: tuple[DType, ...] = ("int8", "uint8", "int16", "uint16")
LARGEST = float(np.finfo(np.float32).max)
INT8 = QSpec("int8", symmetric=True)
UINT8 = QSpec("uint8", symmetric=False)

properties = settings(deadline=None, derandomize=True, max_examples=100)
floats = st.floats(-(2.0**100), 2.0**100, width=32)
vectors = arrays(np.float32, array_shapes(max_dims=3, max_side=5), elements=floats)
specs = st.builds(QSpec, st.sampled_from(DTYPES), st.booleans(), narrow=st.booleans())


def params_of(x: Floats, spec: QSpec) -> QParams:
    return qparams(weight_range(x, spec), spec)


def round_trip(x: Floats, params: QParams) -> Floats:
    return dequantize(quantize(x, params), params)


@cache
def session(
    kind: Literal["Quantize", "Dequantize", "Dynamic"], dtype: str, axis: int = 1
) -> Session:
    """A model of one operator with everything as input."""
    zero, values = f"{dtype}[K] z", "float[N,M] x" if kind == "Quantize" else f"{dtype}[N,M] x"
    out = f"{dtype}[N,M] y" if kind == "Quantize" else "float[N,M] y"
    text = f"g ({values}, float[K] s, {zero}) => ({out}) {{ y = {kind}Linear<axis={axis}>(x,s,z) }}"
    if kind == "Dynamic":
        text = "g (float[N] x) => (uint8[N] y, float s, uint8 z) { y,s,z=DynamicQuantizeLinear(x) }"
    return Session(model_proto(text, 21).SerializeToString())


def test_spec_and_its_spelling() -> None:
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True)
    assert (spec.limits, spec.bits, str(spec)) == ((-127, 127), 8, "int8:sym:channel[1]")
    assert (UINT8.limits, str(UINT8)) == ((0, 255), "uint8:asym:tensor")
    assert QSpec("uint16", False, narrow=True).limits == (0, 65535)


def test_spec_rejects_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="unknown integer type 'int9'"):
        QSpec("int9", symmetric=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'channel' does not go with axis None"):
        QSpec("int8", symmetric=True, granularity="channel")
    with pytest.raises(ValueError, match="'tensor' does not go with axis 0"):
        QSpec("int8", symmetric=True, axis=0)


@pytest.mark.parametrize(
    ("lo", "hi", "axis", "said"),
    [
        (np.nan, 1, None, "NaN or infinity"),
        (0, np.inf, None, "NaN or infinity"),
        (1, 0, None, "inverted"),
        ([0], [1], None, "do not fit axis None"),
        (0, 1, 0, "do not fit axis 0"),
        ([0, 0], [1], 0, "do not fit axis 0"),
        ([0, 3], [1, 2], 0, "inverted"),
    ],
)
def test_range_rejects(lo: object, hi: object, axis: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Range(np.asarray(lo), np.asarray(hi), axis)


@given(vectors, specs)
@properties
def test_error_is_at_most_half_a_step(x: Floats, spec: QSpec) -> None:
    params = params_of(x, spec)
    step = params.scale.astype(np.float64)
    # Asymmetric zero points are rounded: at the ends of the range that may cost another half.
    bound = step / 2 if spec.symmetric else step
    wide = spec.bits == 16  # float32 itself rounds x / scale there
    error = np.abs(round_trip(x, params).astype(np.float64) - x)
    assert (error <= bound * (1.02 if wide else 1.001)).all()


@given(vectors, specs)
@properties
def test_zero_is_exact(x: Floats, spec: QSpec) -> None:
    assert round_trip(np.zeros(3, np.float32), params_of(x, spec)).tolist() == [0, 0, 0]


@given(vectors, st.sampled_from(DTYPES), st.booleans())
@properties
def test_symmetric_zero_point_is_the_middle(x: Floats, dtype: DType, narrow: bool) -> None:
    zero = params_of(x, QSpec(dtype, symmetric=True, narrow=narrow)).zero_point
    assert zero == {"int8": 0, "int16": 0, "uint8": 128, "uint16": 32768}[dtype]


@given(vectors, st.sampled_from(DTYPES))
@properties
def test_narrow_symmetric_ranges_mirror(x: Floats, dtype: DType) -> None:
    params = params_of(x, QSpec(dtype, symmetric=True, narrow=True))
    middle = params.zero_point.astype(int)
    mirrored, plain = quantize(-x, params).astype(int), quantize(x, params).astype(int)
    low, _ = params.spec.limits
    unclipped = mirrored > low
    assert (mirrored[unclipped] - middle == middle - plain[unclipped]).all()


@given(vectors, specs)
@properties
def test_values_outside_saturate(x: Floats, spec: QSpec) -> None:
    params = params_of(x, spec)
    low, high = spec.limits
    with np.errstate(over="ignore"):
        ends = quantize(np.array([-LARGEST, LARGEST], np.float32), params)
    assert low <= ends[0] <= ends[1] <= high
    if np.abs(x).max() > 0:
        assert ends.tolist() == [low, high]


@given(arrays(np.float32, (3, 4), elements=floats), st.sampled_from([0, 1, -1, -2]), specs)
@properties
def test_channels_are_rows_on_their_own(x: Floats, axis: int, spec: QSpec) -> None:
    whole = QSpec(spec.dtype, spec.symmetric, "channel", axis, spec.narrow)
    params = params_of(x, whole)
    got = np.moveaxis(quantize(x, params), axis, 0)
    back = np.moveaxis(round_trip(x, params), axis, 0)
    assert params.per_axis
    for i, row in enumerate(np.moveaxis(x, axis, 0)):
        alone = params_of(row, spec)
        assert (params.scale[i], params.zero_point[i]) == (alone.scale, alone.zero_point)
        assert np.array_equal(got[i], quantize(row, alone))
        assert np.array_equal(back[i], round_trip(row, alone))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_onnx_runtime(dtype: DType, symmetric: bool, axis: int) -> None:
    rng = np.random.default_rng(len(dtype) + symmetric)
    sizes = 10.0 ** rng.integers(-9, 9, (64, 48))
    x = (rng.standard_normal((64, 48)) * sizes).astype(np.float32)
    spec = QSpec(dtype, symmetric, "channel", axis)
    params = params_of(x * np.float32(0.3), spec)  # a third saturates
    x[:, 0] = params.scale[0] * (np.arange(64) + np.float32(0.5))  # ties
    feed = {"x": x, "s": params.scale, "z": params.zero_point}
    q = session("Quantize", dtype, axis).run(feed)["y"]
    assert np.array_equal(quantize(x, params), q)
    y = session("Dequantize", dtype, axis).run({**feed, "x": q})["y"]
    assert np.array_equal(dequantize(q, params), y)


@given(arrays(np.float32, array_shapes(max_dims=1, max_side=20), elements=floats))
@properties
def test_agrees_with_dynamic_quantize_linear(x: Floats) -> None:
    """Its scale is rounded twice in float32: one unit in the last place apart."""
    params = params_of(x, UINT8)
    if params.scale == 1 and np.abs(x).max() < 1e-20:
        return  # ours takes denormal steps for zero
    theirs = session("Dynamic", "uint8").run({"x": x})
    assert np.abs(theirs["s"] / params.scale - 1) < 3e-7
    assert abs(int(theirs["z"]) - int(params.zero_point)) <= 1
    same = QParams(theirs["s"], theirs["z"], UINT8)
    assert np.array_equal(quantize(x, same), theirs["y"])


@pytest.mark.parametrize("spec", [INT8, UINT8])
def test_channels_of_every_size_side_by_side(spec: QSpec) -> None:
    """Zero, constant, denormal and huge rows: finite positive scales, and each row near itself."""
    rows = [0.0, 7.25, -7.25, 1e-40, 0.99 * LARGEST, -0.99 * LARGEST]
    x = np.array([[r, r] for r in rows], np.float32)
    params = params_of(x, QSpec(spec.dtype, spec.symmetric, "channel", 0))
    assert np.isfinite(params.scale).all() and (params.scale > 0).all()
    assert params.scale[0] == params.scale[3] == 1
    with np.errstate(over="ignore"):
        back = round_trip(x, params)
    np.testing.assert_allclose(back, x, rtol=5e-3, atol=1e-39)
    assert not back[0].any()


def test_integers_on_the_grid_come_back_exactly() -> None:
    params = qparams(Range(np.array(-127.0), np.array(127.0)), INT8)
    x = np.arange(-127, 128, dtype=np.float32)
    assert params.scale == 1
    assert np.array_equal(round_trip(x, params), x)


def test_halves_round_to_even() -> None:
    params = qparams(Range(np.array(-127.0), np.array(127.0)), INT8)
    assert quantize(np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32), params).tolist() == [
        0,
        2,
        2,
        0,
        -2,
    ]


def test_weight_range_by_closed_form_and_its_refusals() -> None:
    w = np.array([[1.0, -2.0], [5.0, 0.5]], np.float32)
    whole = weight_range(w, INT8)
    assert (float(whole.lo), float(whole.hi)) == (-2, 5)
    span = weight_range(w, QSpec("int8", True, "channel", -1))
    assert (span.lo.tolist(), span.hi.tolist(), span.axis) == ([1, -2], [5, 0.5], -1)
    with pytest.raises(ValueError, match="empty constant"):
        weight_range(np.empty((0, 3), np.float32), INT8)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            weight_range(np.array([1, bad], np.float32), INT8)


def test_sqnr_closed_forms() -> None:
    ones = np.ones(10, np.float32)
    assert sqnr_db(ones, ones) == float("inf")
    assert sqnr_db(ones, ones * np.float32(0.9)) == pytest.approx(20, abs=1e-5)
    assert sqnr_db(0 * ones, ones) == 0
    assert sqnr_db(np.zeros(0), np.zeros(0)) == float("inf")


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_large_arrays_are_worked_on_in_parts(axis: int | None, monkeypatch: Any) -> None:
    x = np.random.default_rng(0).standard_normal((7, 5, 3)).astype(np.float32)
    granularity: Any = "tensor" if axis is None else "channel"
    spec = QSpec("int8", symmetric=True, granularity=granularity, axis=axis)
    params = qparams(weight_range(x, spec), spec)
    q, noise = quantize(x, params), sqnr_db(x, dequantize(quantize(x, params), params))
    for step in (1, 16, 40):  # less than a row, one row, two with a rest
        monkeypatch.setattr("qcompile.quant.affine._STEP", step)
        assert np.array_equal(quantize(x, params), q)
        # Float64 sums of 105 squares in another order differ by less than 105 * 2^-53 of them.
        assert quantized_sqnr_db(x, q, params) == pytest.approx(noise, rel=1e-12)
