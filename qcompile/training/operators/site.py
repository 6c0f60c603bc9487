"""What the functions for operators are built from: a node with its attributes and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch

from qcompile.errors import TrainingError
from qcompile.ir import Node, is_constant, op_name
from qcompile.ir.tensor import array
from qcompile.quant import Array

# Takes the node's inputs in order, None where one is omitted, and returns its result, or a tuple.
Function: TypeAlias = Callable[..., Any]
Numbers: TypeAlias = Any  # Tensor.tolist(): a number, or nested lists of numbers

_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    # torch computes little in these types, so their values are kept in a wider or signed one.
    onnx.TensorProto.UINT16: torch.int32,
    onnx.TensorProto.UINT32: torch.int64,
    onnx.TensorProto.UINT64: torch.int64,
    onnx.TensorProto.INT4: torch.int8,
    onnx.TensorProto.UINT4: torch.uint8,
}


@dataclass(frozen=True)
class Site:
    """A node whose function is to be built.

    opset: of ONNX itself. readers: names of the operators that read the first result.
    """

    node: Node
    opset: int
    readers: frozenset[str] = frozenset()

    @property
    def outputs(self) -> int:
        """How many results the node has, omitted ones at the end not counted."""
        return max((i + 1 for i, t in enumerate(self.node.outputs) if t.name), default=0)

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute; strings are text."""
        value = self.node.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        """True where the node has that input."""
        return len(self.node.inputs) > index and bool(self.node.inputs[index].name)

    def constant(self, index: int) -> Array | None:
        """The values of an input that is a constant, else None."""
        known = self.has(index) and is_constant(self.node.inputs[index])
        return array(self.node.inputs[index]) if known else None

    def scalar(self, index: int) -> float | int | bool | None:
        """The value of an input that is a constant with one value, else None."""
        values = self.constant(index)
        return None if values is None or values.ndim or values.dtype.kind not in "fiub" else (
            values.item()
        )  # fmt: skip

    def refusal(self, what: str) -> TrainingError:
        """The error for a form of the operator that has no function."""
        node = self.node
        return TrainingError(
            f"node {node.name!r} ({op_name(node)}): {what} cannot be trained; give the model "
            "without it"
        )


@dataclass(frozen=True)
class Operator:
    """make: returns the function of a node; raises TrainingError where it has none. numbers: the
    inputs that this function takes as Python numbers (``Tensor.tolist``), such as shapes and axes.
    """

    make: Callable[[Site], Function]
    numbers: tuple[int, ...] = ()


Operators: TypeAlias = Mapping[str, Operator]


def always(function: Function) -> Operator:
    """An operator with the same function for all nodes."""
    return Operator(lambda _: function)


def torch_type(site: Site, onnx_type: Any) -> torch.dtype:
    """The type in torch of an ONNX type, given as its number or as numpy's type."""
    number = onnx_type if isinstance(onnx_type, int) else _number(np.dtype(onnx_type))
    if number not in _TYPES:
        raise site.refusal(f"type {onnx_type}")
    return _TYPES[number]


def _number(dtype: np.dtype[Any]) -> int | None:
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
    except (KeyError, ValueError):
        return None


def as_tensor(values: Array, name: str) -> torch.Tensor:
    """A copy of an array in the type that stands for its own; raises TrainingError for strings."""
    number = _number(values.dtype)
    if number not in _TYPES:
        raise TrainingError(
            f"constant {name!r}: type {values.dtype} cannot be trained; remove what reads it from "
            "the model"
        )
    kind = _TYPES[number]
    plain = np.dtype(np.float32) if kind == torch.bfloat16 else np.dtype(str(kind)[6:])
    return torch.from_numpy(np.array(values, dtype=plain, order="C")).to(kind)


def in_order(numbers: Numbers) -> list[Any]:
    """A vector of numbers as a list; a scalar counts as a vector of one value."""
    return numbers if isinstance(numbers, list) else [numbers]


def axis_in(axis: int, rank: int) -> int:
    """A non-negative axis."""
    return axis + rank if axis < 0 else axis
