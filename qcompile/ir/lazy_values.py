"""Values of constants: in memory, in their protobuf message, or in a memory-mapped file.

Only this file bypasses ``Constant.values``, which would read lazy values and keep them.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from qcompile.quant import Array
from qcompile.system.memory_map import MappedFile

# Bits of element types of which a byte of a file holds several; numpy takes a byte for each.
PACKED_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}


class FileValues(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """Values of a constant in a file; ``tensor`` has its name, type and shape."""

    def __init__(self, tensor: onnx.TensorProto, file: MappedFile, offset: int) -> None:
        super().__init__(tensor)
        self._file, self._offset = file, offset
        self._dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))

    def load(self) -> Array:
        """A read-only view into the file, in the constant's type and shape."""
        dtype = self._dtype
        size = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize
        return self._file.view(self._offset, size).view(dtype).reshape(tuple(self.shape))


def values_of(constant: gs.Constant) -> Array:
    """The values as an array; for values in a file, a view that is not cached."""
    values = constant._values
    if isinstance(values, FileValues):
        values = values.load()
    elif isinstance(values, LazyValues):
        values = onnx.numpy_helper.to_array(values.tensor)
    result: Array = np.asarray(values)
    return result


def nbytes(constant: gs.Constant) -> int:
    """Bytes of the values in a file, without reading them: several of 4 or 2 bits in one."""
    values = constant._values
    bits = PACKED_BITS.get(str(values.dtype))
    return int(values.nbytes) if bits is None else -(-int(values.nbytes) * bits // 8)


def is_stored(constant: gs.Constant) -> bool:
    """True where the values are in a file, so that ``stored_proto`` does not hold them either."""
    return isinstance(constant._values, FileValues)


def stored_proto(constant: gs.Constant) -> onnx.TensorProto | None:
    """The TensorProto that a constant was loaded from, None once its values are an array."""
    values = constant._values
    return values.tensor if isinstance(values, LazyValues) else None


def sparse_proto(constant: gs.Constant) -> onnx.SparseTensorProto | None:
    """The message of a constant that was loaded sparse and is not dense yet, else None."""
    values = constant._values
    return values.tensor if isinstance(values, SparseValues) else None


def make_constant(variable: gs.Variable, constant: gs.Constant) -> None:
    """Turn a variable into a constant with the values of ``constant``, without reading them."""
    variable.to_constant(constant._values)


def make_constant_like(constant: gs.Constant) -> gs.Constant:
    """A constant of the same name, and the same values, without reading them."""
    return gs.Constant(constant.name, constant._values)
