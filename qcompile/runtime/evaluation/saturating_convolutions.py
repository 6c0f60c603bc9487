"""Quantized convolutions as matrix multiplications, in the order in which ONNX Runtime sums.

QLinearConv (qlinearconv.cc: ReorderFilter, Im2col NHWC) multiplies patches by filters with the
position in the kernel outermost and the group's channels innermost, so neighbours are channels of
one position; MLAS's kernels for symmetric weights (convsym.cpp) do the same. Where a group has
one channel, neighbours are positions. Depthwise convolutions have separate kernels, which add in
int32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from qcompile.quant import Array
from qcompile.runtime.evaluation.saturating_sums import (
    Fragment,
    Pairs,
    every_pair,
    excess,
    saturable,
)

_SHIFT = 1 << 7  # between int8 and uint8
_PLACING = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


@dataclass(frozen=True)
class Filters:
    """The filters of a convolution: int8 [outputs, channels of a group, *kernel]."""

    values: Array
    groups: int

    @property
    def depthwise(self) -> bool:
        return self.values.shape[:2] == (self.groups, 1)

    @property
    def positions(self) -> int:
        """Number of positions of the kernel."""
        return math.prod(self.values.shape[2:])

    @property
    def channels(self) -> int:
        """Number of channels of the data."""
        return self.groups * int(self.values.shape[1])

    def order(self) -> Array:
        """int64 [groups, inputs]: rows of ``patches`` in the order in which they are added."""
        rows = np.arange(self.channels * self.positions)
        grouped = rows.reshape(self.groups, -1, self.positions)
        return grouped.transpose(0, 2, 1).reshape(self.groups, -1)

    def matrices(self) -> Array:
        """int8 [groups, inputs, outputs of a group], in the same order."""
        outputs, inputs = len(self.values) // self.groups, self.values.shape[1]
        grouped = self.values.reshape(self.groups, outputs, inputs, self.positions)
        return grouped.transpose(0, 3, 2, 1).reshape(self.groups, -1, outputs)

    def pairs(self) -> Pairs:
        """Pairs of rows of ``patches`` that can saturate."""
        found = []
        for i, (order, matrix) in enumerate(zip(self.order(), self.matrices(), strict=True)):
            pairs = saturable(matrix)
            columns = pairs.columns + i * matrix.shape[1]
            found.append(Pairs(order[pairs.rows], pairs.weights, columns))
        parts = ([getattr(p, name) for p in found] for name in ("rows", "weights", "columns"))
        return Pairs(*(np.concatenate(part) for part in parts))


@dataclass(frozen=True)
class Convolution:
    """A QLinearConv of data [n, channels, *space]: its node, and the names of its inputs."""

    node: onnx.NodeProto
    filters: Filters
    data: str
    zero: str
    weight: str
    weight_zero: str

    @property
    def placing(self) -> dict[str, Any]:
        """The attributes that define which data each filter position is multiplied with."""
        get = onnx.helper.get_attribute_value
        return {a.name: get(a) for a in self.node.attribute if a.name in _PLACING}


def saturated(f: Fragment, it: Convolution, pairs: Pairs | None) -> str:
    """The saturated sums: int32 [n, outputs, *space]. ``pairs`` None: all pairs are computed."""
    exact, data = _exact(f, it), _patches(f, it)
    swap = [1, 0, *range(2, it.filters.values.ndim)]
    outwards = f.add("Transpose", exact, perm=swap)
    if pairs is None:
        flat = _every_pair(f, it, outwards, data)
    else:
        flat = excess(f, data, pairs, len(it.filters.values))
    shaped = f.add("Transpose", f.add("Reshape", flat, f.add("Shape", outwards)), perm=swap)
    return shaped if pairs is None else f.add("Add", exact, shaped)


def _exact(f: Fragment, it: Convolution) -> str:
    """The sums without saturation: int32 [n, outputs, *space].

    uint8 by uint8 is exact on all processors, and the only types for which ConvInteger has a fast
    kernel, so the weight and its zero point (all values equal) are shifted.
    """
    flat = f.add("Reshape", it.weight_zero, f.integers(-1))
    zero = f.add("Gather", flat, f.constant(np.array(0, np.int64)), axis=0)
    shift = f.constant(np.array(_SHIFT, np.int32))
    shifted = []
    for tensor in (it.weight, zero):
        wide = f.add("Add", f.cast(tensor, TensorProto.INT32), shift)
        shifted.append(f.cast(wide, TensorProto.UINT8))
    weight, weight_zero = shifted
    operands = it.data, weight, it.zero, weight_zero
    return f.add("ConvInteger", *operands, group=it.filters.groups, **it.placing)


def _patches(f: Fragment, it: Convolution) -> str:
    """The data that filters are multiplied with (im2col): uint8 [channels · positions, n · space].

    By a float convolution that copies: one filter per channel and position, all zeros but one, so
    padding is the runtime's. It pads with 0, so the zero point is subtracted first.
    """
    zero = f.cast(f.add("Reshape", it.zero, f.constant(np.zeros(0, np.int64))), TensorProto.FLOAT)
    centred = f.add("Sub", f.cast(it.data, TensorProto.FLOAT), zero)
    copy = np.tile(np.eye(it.filters.positions, dtype=np.float32), (it.filters.channels, 1))
    kernel = copy.reshape(len(copy), 1, *it.filters.values.shape[2:])
    copied = f.add("Conv", centred, f.constant(kernel), group=it.filters.channels, **it.placing)
    whole = f.cast(f.add("Add", copied, zero), TensorProto.UINT8)
    swapped = f.add("Transpose", whole, perm=[1, 0, *range(2, kernel.ndim)])
    return f.add("Reshape", swapped, f.integers(len(copy), -1))


def _every_pair(f: Fragment, it: Convolution, exact: str, data: str) -> str:
    """All sums: int32 [groups, outputs of a group, n · space], for exact [outputs, n, *space]."""
    groups, inputs, outputs = it.filters.matrices().shape
    kernel = groups, outputs, it.filters.values.shape[1], it.filters.positions
    split = f.add("Transpose", f.add("Reshape", it.weight, f.integers(*kernel)), perm=[0, 1, 3, 2])
    left = f.add("Reshape", split, f.integers(groups, outputs, inputs))
    rows = f.add("Gather", data, f.constant(it.filters.order().reshape(-1)), axis=0)
    right = f.add("Reshape", rows, f.integers(groups, inputs, -1))
    sums = f.add("Reshape", exact, f.integers(groups, outputs, -1))
    return every_pair(f, sums, left, right)
