"""QuantizeLinear and DequantizeLinear, as they stand in models that came quantized.

Quantizers that are trained are no operators but slots (``torch_graph.py``): rounding here has no
gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from qcompile.training.operators.site import (
    Function,
    Operator,
    Operators,
    Site,
    axis_in,
    torch_type,
)

_T = onnx.TensorProto
_LIMITS: dict[int, tuple[int, int]] = {_T.INT8: (-128, 127), _T.UINT8: (0, 255),
           _T.INT16: (-32768, 32767),
           _T.UINT16: (0, 65535), _T.INT4: (-8, 7), _T.UINT4: (0, 15)}  # fmt: skip


def _spread(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points in a shape that broadcasts against ``x``."""
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if values.dim() != 1 or values.numel() == 1:
        return values.reshape(()) if values.numel() == 1 else values
    shape = [1] * x.dim()
    shape[axis_in(axis, x.dim())] = -1
    return values.reshape(shape)


def _dequantize(site: Site) -> Function:
    axis, block = site.attr("axis", 1), site.attr("block_size", 0)

    def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        values = x.to(scale.dtype)
        if zero is not None:
            values = values - _spread(zero, x, axis, block).to(scale.dtype)
        return values * _spread(scale, x, axis, block)

    return dequantize


def _quantize(site: Site) -> Function:
    """Halves round to even, then integers saturate."""
    axis, block = site.attr("axis", 1), site.attr("block_size", 0)
    number = _result_type(site)
    if number not in _LIMITS:
        raise site.refusal(f"quantization to ONNX type {number}")
    kind, limits = torch_type(site, number), _LIMITS[number]

    def quantize(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        values = torch.round(x / _spread(scale, x, axis, block))
        if zero is not None:
            values = values + _spread(zero, x, axis, block).to(values.dtype)
        return torch.clamp(values, *limits).to(kind)

    return quantize


def _result_type(site: Site) -> int:
    given = site.attr("output_dtype", 0)
    if given:
        return int(given)
    if not site.has(2):
        return int(_T.UINT8)
    dtype: Any = site.node.inputs[2].dtype
    return dtype if isinstance(dtype, int) else int(
        onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    )  # fmt: skip


_BOTH: Operators = {
    "DequantizeLinear": Operator(_dequantize),
    "QuantizeLinear": Operator(_quantize),
}
OPERATORS: Operators = {**_BOTH, **{f"com.microsoft.{name}": op for name, op in _BOTH.items()}}
