"""Operators that make tensors from shapes and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.ir import is_constant
from qcompile.ir.tensor import array
from qcompile.quant import Array
from qcompile.training.operators.site import (
    Function,
    Numbers,
    Operator,
    Operators,
    Site,
    always,
    as_tensor,
    in_order,
    torch_type,
)


def _shape(site: Site) -> Function:
    part = slice(site.attr("start", 0), site.attr("end"))
    return lambda x: torch.tensor(x.shape[part], dtype=torch.int64)


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    bounds = (t.item() for t in (start, limit, delta))
    return torch.arange(*bounds, dtype=start.dtype, device=start.device)


def _constant_of_shape(site: Site) -> Function:
    given = site.attr("value")
    value = as_tensor(np.zeros(1, np.float32) if given is None else _values(given), "value")
    number, kind = value.reshape(-1)[0].item(), value.dtype
    return lambda sizes: torch.full(in_order(sizes), number, dtype=kind)


def _constant(site: Site) -> Function:
    """Constants that a graph output or a body names; the others are initializers."""
    attrs = site.node.attrs
    kinds: dict[str, Any] = {"value_float": np.float32, "value_floats": np.float32,
                             "value_int": np.int64, "value_ints": np.int64}  # fmt: skip
    name = next((n for n in ("value", *kinds) if n in attrs), None)
    if name is None:
        raise site.refusal("a constant of this kind")
    values = _values(attrs[name]) if name == "value" else np.array(attrs[name], kinds[name])
    made = as_tensor(values, site.node.outputs[0].name)
    return lambda: made


def _values(attribute: Any) -> Array:
    if is_constant(attribute):
        return array(attribute)
    return np.asarray(attribute)


def _eye_like(site: Site) -> Function:
    kind = site.attr("dtype")
    given = None if kind is None else torch_type(site, kind)
    offset = site.attr("k", 0)

    def eye(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape, dtype=given or x.dtype, device=x.device)
        return torch.triu(torch.tril(ones, offset), offset)

    return eye


def _one_hot(site: Site) -> Function:
    axis = site.attr("axis", -1)

    def one_hot(indices: Tensor, depth: Numbers, values: Tensor) -> Tensor:
        (size,) = in_order(depth)
        size = int(size)
        classes = torch.arange(size, device=indices.device)
        indices = torch.where(indices < 0, indices + size, indices).to(torch.int64)
        place = axis if axis >= 0 else axis + indices.dim() + 1
        hit = (indices.unsqueeze(-1) == classes).movedim(-1, place)
        return torch.where(hit, values[1], values[0])

    return one_hot


OPERATORS: Operators = {
    "Constant": Operator(_constant),
    "ConstantOfShape": Operator(_constant_of_shape, numbers=(0,)),
    "EyeLike": Operator(_eye_like),
    "OneHot": Operator(_one_hot, numbers=(1,)),
    "Range": always(_range),
    "Shape": Operator(_shape),
    "Size": always(lambda x: torch.tensor(x.numel(), dtype=torch.int64)),
}
