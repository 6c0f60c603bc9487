"""The tensors of a graph: constants and variables, their types, shapes and values."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qcompile.ir import lazy_values
from qcompile.quant import Array

Node: TypeAlias = gs.Node
Tensor: TypeAlias = gs.Tensor
Variable: TypeAlias = gs.Variable
Constant: TypeAlias = gs.Constant
# One entry per dimension: a size, the name of a symbolic dimension, or None where unknown.
Shape: TypeAlias = tuple[int | str | None, ...]
_TENSOR = "tensor_type"
HalfType = Literal["float16", "bfloat16"]
HALF_TYPES: dict[int, HalfType] = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def is_constant(tensor: Tensor) -> bool:
    """True for an initializer, or a Constant node that loading turned into one."""
    return isinstance(tensor, gs.Constant)


def is_float(tensor: Tensor, dtype: type[np.floating[Any]] = np.float32) -> bool:
    """True where the tensor is known to be of type float32, or ``dtype``, and not a sequence."""
    known = tensor.dtype is not None and getattr(tensor, "type", _TENSOR) == _TENSOR
    return known and _np_dtype(tensor.dtype) == dtype


def half_type(tensor: Tensor) -> HalfType | None:
    """Which 16-bit float type a tensor is known to have, None for any other type."""
    if tensor.dtype is None or getattr(tensor, "type", _TENSOR) != _TENSOR:
        return None
    if isinstance(tensor.dtype, int):  # an ONNX enum, for a type that numpy lacks
        return HALF_TYPES.get(int(tensor.dtype))
    known = _np_dtype(tensor.dtype)
    return next(
        (name for name in HALF_TYPES.values() if known is not None and known.name == name), None
    )


def rank(tensor: Tensor) -> int | None:
    """Number of dimensions, None where unknown."""
    return None if tensor.shape is None else len(tensor.shape)


def array(tensor: Tensor) -> Array:
    """The values of a constant, read only.

    Weights in the loaded file are views into it, neither copied nor cached.
    """
    return lazy_values.values_of(tensor)


def scalar(tensor: Tensor) -> float | None:
    """The value of a one-element numeric constant, else None."""
    if not is_constant(tensor) or int(np.prod(tensor.shape, dtype=np.int64)) != 1:
        return None
    values = array(tensor)
    return float(values.reshape(-1)[0]) if values.dtype.kind in "fiu" else None


def is_zero(tensor: Tensor) -> bool:
    """True for an omitted input, and for a constant with only zeros."""
    return not tensor.name or (is_constant(tensor) and not array(tensor).any())


def _np_dtype(dtype: Any) -> np.dtype[Any] | None:
    try:
        known: np.dtype[Any] = np.dtype(dtype)
        return known
    except TypeError:  # an ONNX enum for a type numpy lacks
        return None


def shape_of(tensor: Tensor) -> Shape | None:
    """Dimensions as far as known: an int, or the name of a symbolic dimension."""
    return None if tensor.shape is None else tuple(tensor.shape)
