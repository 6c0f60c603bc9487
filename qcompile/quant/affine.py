"""Quantization parameters and arithmetic, in numpy.

Formulas are those of ONNX QuantizeLinear and DequantizeLinear (opset 13 and later):
``q = saturate(round_half_even(x / scale) + zero_point)``, ``x' = (q - zero_point) * scale``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from qcompile.quant.types import Array, Floats, QParams, QSpec, Range

# The smallest normal float32. A smaller scale would be denormal: the tensor counts as all zeros.
_SMALLEST_SCALE = np.float32(2.0**-126)
# Above it, predicted errors, which are products of squares, overflow float32.
_LARGEST_VALUE = 2.0**28
# Finer than this, float16 has fewer than 5 bits for a scale: a larger one costs less.
_SMALLEST_HALF_SCALE = 2.0**-20
_STEP = 1 << 18  # values per step, so that temporaries stay in the cache


def out_of_scale(lo: float, hi: float) -> str | None:
    """Why no scale represents values between these bounds, None where one does (also for zeros)."""
    top = max(abs(lo), abs(hi))
    if top > _LARGEST_VALUE:
        return f"values up to {top:.3g}, over 2^28: too large for a scale"
    if 0 < top < 256 * _SMALLEST_SCALE:
        return f"values up to {top:.3g} only: too small for a scale"
    return None


def qparams(span: Range, spec: QSpec) -> QParams:
    """Scale and zero point that cover ``span``, which is widened to include 0.

    0 must be exact, because padding and ReLU produce it. Symmetric: ``scale = max|x| / q_max`` and
    zero point 0 (128 for uint8). Asymmetric: ``scale = (hi - lo) / (q_max - q_min)`` and
    ``zero_point = round(q_min - lo / scale)``, as in ONNX DynamicQuantizeLinear. Scales are float32
    arrays, of float16 numbers if ``spec.half_scale``.
    """
    q_min, q_max = spec.limits
    lo, hi = np.minimum(span.lo, 0.0), np.maximum(span.hi, 0.0)
    if spec.symmetric:
        middle = 0 if q_min < 0 else (q_max + 1) // 2
        scale = scale_of_type(np.maximum(-lo, hi) / (q_max - middle), spec)
        zero = np.full(scale.shape, middle)
    else:
        scale = scale_of_type((hi - lo) / (q_max - q_min), spec)
        safe = np.where(scale < _SMALLEST_SCALE, 1.0, scale)  # no division by zero
        zero = np.clip(np.rint(q_min - lo / safe), q_min, q_max)
    scale = np.where(scale < _SMALLEST_SCALE, 1.0, scale)  # all-zero tensor: any scale is exact
    return QParams(scale.astype(np.float32), zero.astype(spec.dtype), spec)


def scale_of_type(scale: Array, spec: QSpec) -> Array:
    """Scales that the type of the spec holds: for float16 the next number that is not smaller.

    So the range stays covered, and integers that are chosen with this scale need no correction.
    Scales of zeros, and those over float16's largest number, stay as they are.
    """
    if not spec.half_scale:
        return scale
    fits = (scale >= _SMALLEST_SCALE) & (scale <= float(np.finfo(np.float16).max))
    wanted = np.where(fits, np.maximum(scale, _SMALLEST_HALF_SCALE), 1.0)
    half = wanted.astype(np.float16)
    larger = np.where(half < wanted, np.nextafter(half, np.float16(np.inf)), half)
    chosen: Array = np.where(fits, larger.astype(scale.dtype), scale)
    return chosen


def _spread(values: Array, ndim: int, axis: int | None) -> Array:
    """Reshape a per-channel vector so that it broadcasts along ``axis`` of an ``ndim`` tensor."""
    if values.ndim == 0 or axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Array, params: QParams) -> Array:
    """ONNX QuantizeLinear: a float array of any shape as ``params.spec.dtype``."""
    quantized = np.empty(x.shape, params.spec.dtype)
    for rows, part in _parts(x.shape, params):
        quantized[rows] = _quantized(x[rows], part)
    return quantized


def _quantized(x: Array, params: QParams) -> Array:
    axis = params.spec.axis
    scale = _spread(params.scale, x.ndim, axis)
    zero = _spread(params.zero_point, x.ndim, axis)
    q_min, q_max = params.spec.limits
    scaled = np.rint(np.asarray(x, np.float32) / scale) + zero.astype(np.float32)
    clipped: Array = np.clip(scaled, q_min, q_max).astype(params.spec.dtype)
    return clipped


def dequantize(q: Array, params: QParams) -> Floats:
    """ONNX DequantizeLinear: quantized values of any shape as float32."""
    axis = params.spec.axis
    scale = _spread(params.scale, q.ndim, axis)
    zero = _spread(params.zero_point, q.ndim, axis)
    real: Floats = (q.astype(np.float32) - zero.astype(np.float32)) * scale
    return real


def _parts(shape: tuple[int, ...], params: QParams) -> Iterator[tuple[Any, QParams]]:
    """Slices of the first axis, each with its parameters: small enough for the cache."""
    if not shape:
        yield (), params
        return
    step = max(1, _STEP // max(1, math.prod(shape[1:])))
    split_params = params.per_axis and (params.spec.axis or 0) % len(shape) == 0
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        part = params
        if split_params:
            part = QParams(params.scale[rows], params.zero_point[rows], params.spec)
        yield rows, part


def weight_range(weight: Array, spec: QSpec) -> Range:
    """The exact range of a constant: per tensor, or per channel along ``spec.axis``.

    Raises ValueError where the constant is empty, or holds NaN or infinity.
    """
    if weight.size == 0:
        raise ValueError("empty constant")
    if spec.axis is None:
        return Range(weight.min(), weight.max())
    axis = spec.axis % weight.ndim
    other_axes = tuple(i for i in range(weight.ndim) if i != axis)
    return Range(weight.min(axis=other_axes), weight.max(axis=other_axes), spec.axis)


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Signal to quantization noise ratio, ``10 log10(sum x^2 / sum (x - y)^2)`` in dB.

    Infinite where the arrays are equal, 0 where the reference is all zero and they differ.
    """
    return _ratio_db(*_energies(reference, candidate))


def quantized_sqnr_db(reference: Array, q: Array, params: QParams) -> float:
    """``sqnr_db`` of the values that ``q`` represents."""
    parts = _parts(reference.shape, params)
    energies = [_energies(reference[r], dequantize(q[r], part)) for r, part in parts]
    return _ratio_db(sum(signal for signal, _ in energies), sum(noise for _, noise in energies))


def _energies(reference: Array, candidate: Array) -> tuple[float, float]:
    """Sums of squares of the signal and of the noise."""
    x = np.asarray(reference, np.float64)
    return float(np.square(x).sum()), float(np.square(x - candidate).sum())


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else 0.0
