"""Values of constants: in memory, in their message, or in a file until they are asked for.

The only file that looks behind ``Constant.values``, which would read lazy values and keep them.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from qcompile.quant import Array
from qcompile.system.memory_map import MappedFile


class FileValues(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """Values of a constant that lie in a file; ``tensor`` says all about it but its values."""

    def __init__(self, tensor: onnx.TensorProto, file: MappedFile, offset: int) -> None:
        super().__init__(tensor)
        self._file, self._offset = file, offset
        self._dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))

    def load(self) -> Array:
        """A view into the file, as it is on each call."""
        dtype = self._dtype
        size = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize
        return self._file.view(self._offset, size).view(dtype).reshape(tuple(self.shape))


def values_of(constant: gs.Constant) -> Array:
    """The values as an array; of a file, a view that is not kept."""
    values = constant._values
    if isinstance(values, FileValues):
        values = values.load()
    elif isinstance(values, LazyValues):
        values = onnx.numpy_helper.to_array(values.tensor)
    result: Array = np.asarray(values)
    return result


def nbytes(constant: gs.Constant) -> int:
    """Bytes of the values, without reading them."""
    return int(constant._values.nbytes)


def is_stored(constant: gs.Constant) -> bool:
    """True where the values lie in a file, and are not in ``stored_proto`` either."""
    return isinstance(constant._values, FileValues)


def stored_proto(constant: gs.Constant) -> onnx.TensorProto | None:
    """The message that a constant came in, as long as its values are not an array."""
    values = constant._values
    return values.tensor if isinstance(values, LazyValues) else None


def sparse_proto(constant: gs.Constant) -> onnx.SparseTensorProto | None:
    """The message of a constant that came in sparse and is not made dense yet."""
    values = constant._values
    return values.tensor if isinstance(values, SparseValues) else None


def make_constant(variable: gs.Variable, constant: gs.Constant) -> None:
    """Let the variable become a constant with the same values, wherever they lie."""
    variable.to_constant(constant._values)
