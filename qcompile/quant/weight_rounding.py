"""How a weight is rounded: to nearest, or as a pass has chosen.

One place for both, because a shift that is folded into a bias must be multiplied by the weight as
it will be quantized: with the float weight, the error ``shift · (W - Wq·s)`` would be the same for
every token and add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.quant.affine import dequantize, qparams, quantize, scale_of_type, weight_range
from qcompile.quant.types import Array, QParams, QSpec

# x86 without VNNI adds a[2i] w[2i] + a[2i + 1] w[2i + 1] in int16, with a up to 255: two weights of
# one sign fit where they sum to at most 128, 255 * 128 < 2^15. Source: MLAS, QgemmU8S8KernelAvx2.
PAIR_SUM = 128
# Rounding moves each of two values by half a step at most: sums of 127.5 steps stay within 128.
_PAIR_STEPS = PAIR_SUM - 0.5


def nearest_step(values: Array, spec: QSpec) -> Rounded:
    """Round each value to the nearest step; ranges are the weight's own extrema.

    Raises ValueError where the weight is empty or holds NaN or infinity.
    """
    params = weight_params(values, spec)
    return Rounded(quantize(values, params), params)


def weight_params(values: Array, spec: QSpec) -> QParams:
    """Scales of a constant of any shape from its extrema; if ``paired``, also from its pairs.

    Per channel ``max(max |w| / 127, max same-sign sum of a pair / 127.5)``: after rounding
    to nearest, no pair sums to over 128. Raises ValueError where the constant is empty or
    holds NaN or infinity, or where a paired one is neither matrix nor kernel.
    """
    params = qparams(weight_range(values, spec), spec)
    if not spec.paired:
        return params
    first, second = pairs(_inputs_first(values, spec))
    scale = scale_of_type(paired_scale(params.scale, first, second), spec)
    return QParams(scale, params.zero_point, spec)


def paired_scale(scale: Array, first: Array, second: Array) -> Array:
    """Scales (outputs,), larger where pairs of rows, (pairs, outputs) each, need that."""
    # The scale at which the largest sum of a pair is 127.5 steps; (outputs,).
    needed = worst_sums(first, second).max(axis=0, initial=0) / np.float32(_PAIR_STEPS)
    # An all-zero channel keeps the scale that qparams gives it: ``needed`` is 0 there.
    larger: Array = np.maximum(scale, needed)
    return larger


def pairs(weight: Array) -> tuple[Array, Array]:
    """Rows 2i and rows 2i + 1 of a matrix (inputs, outputs), without an odd last row."""
    even = weight[: len(weight) // 2 * 2]
    return even[0::2], even[1::2]


def worst_sums(first: Array, second: Array) -> Array:
    """Largest magnitude that ``a · first + b · second`` takes for a, b in [0, 1], elementwise.

    Of values with opposite signs only one counts.
    """
    up = np.maximum(first, 0) + np.maximum(second, 0)
    down = np.minimum(first, 0) + np.minimum(second, 0)
    largest: Array = np.maximum(up, -down)
    return largest


def summed_first(kernel: Array) -> Array:
    """A convolution's kernel [outputs, channels per group, *space] as (inputs, outputs).

    In the order in which ONNX Runtime sums: the channels of one position are neighbours. Source:
    onnxruntime qlinearconv.cc, ReorderFilter and Im2col on channels last.
    """
    ordered: Array = np.moveaxis(kernel, 1, -1).reshape(len(kernel), -1).T
    return ordered


def _inputs_first(values: Array, spec: QSpec) -> Array:
    """A matrix, or the kernel of a convolution, as (inputs, outputs). Raises ValueError else."""
    axis = -1 if spec.axis is None else spec.axis % max(values.ndim, 1)
    if values.ndim == 2 and axis >= 0:
        return values if axis == 1 else values.T
    if values.ndim > 2 and axis == 0:
        return summed_first(values)
    raise ValueError(f"pairs need a matrix or a kernel, found shape {list(values.shape)}")


def real(rounded: Rounded) -> Array:
    """The float32 values that the rounded weight represents."""
    return dequantize(rounded.values, rounded.params)


@dataclass(frozen=True)
class Rounded:
    """A quantized weight: values in the weight's shape, and their scales.

    steps: int8 in that shape, of a weight of few bits: each value is a code times its step, which
    is the multiplier of its block times the factor of its row. None for ones.
    """

    values: Array
    params: QParams
    steps: Array | None = None
