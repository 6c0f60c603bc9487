"""Values of a constant that stay in their file until they are asked for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qcompile.quant import Array
from qcompile.system.memory_map import MappedFile


class FileValues(gs.ir.tensor.LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
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
