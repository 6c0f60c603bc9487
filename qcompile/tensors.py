"""Tensor data before it is trusted: in the model file, or mapped from a file beside it.

That file must lie in the model's folder, also once links are followed. Either must hold all of the
tensor.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from qcompile.errors import ModelError
from qcompile.qtypes import Array

# Element types of which a byte holds several: not mapped, since numpy does not pack.
_PACKED = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


def check_values(tensor: onnx.TensorProto) -> None:
    """Raises ModelError where the values in the model file do not fill the tensor's shape."""
    size, kind = _size(tensor), _type_name(tensor)
    if tensor.HasField("raw_data"):
        found = len(tensor.raw_data)
    else:
        found = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
        if kind not in _PACKED:  # which have a byte an entry
            size = _elements(tensor) * (2 if kind.startswith("COMPLEX") else 1)
    if found != size:
        raise ModelError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} has {found} bytes or values, "
            f"expected {size}"
        )


def is_external(tensor: onnx.TensorProto) -> bool:
    """True where the tensor's data is not in the model file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def external_file(tensor: onnx.TensorProto, folder: Path | None) -> Path | None:
    """The file that holds a tensor's data; None where there is none that may be read."""
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    try:
        return _path(tensor.name, location, folder)
    except ModelError:
        return None


def map_external(tensor: onnx.TensorProto, folder: Path | None) -> Array | None:
    """External data as a read-only memory map; None where it had to be read into the tensor.

    Raises ModelError: no folder known, missing, too short, outside of the folder.
    """
    if _type_name(tensor) in _PACKED:
        embed_external(tensor, folder)
        return None
    raw = _bytes(tensor, folder)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return raw.view(dtype).reshape(tuple(tensor.dims))


def embed_external(tensor: onnx.TensorProto, folder: Path | None) -> None:
    """Read external data into the tensor. Raises ModelError as ``map_external`` does."""
    raw = _bytes(tensor, folder).tobytes()
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.raw_data = raw


def _bytes(tensor: onnx.TensorProto, folder: Path | None) -> npt.NDArray[np.uint8]:
    info = {entry.key: entry.value for entry in tensor.external_data}
    if _type_name(tensor) == "STRING":
        raise ModelError(f"tensor {tensor.name!r} holds strings, which cannot be external")
    path = _path(tensor.name, info.get("location", ""), folder)
    offset, size = _number(tensor.name, info.get("offset", "0")), _size(tensor)
    found = path.stat().st_size
    if offset + size > found:
        raise ModelError(
            f"external data {path.name!r} is too short for tensor {tensor.name!r}: "
            f"{found} bytes, {offset + size} needed"
        )
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "r", offset=offset, shape=(size,))


def _path(name: str, location: str, folder: Path | None) -> Path:
    if folder is None:
        raise ModelError(
            f"tensor {name!r} has its data in file {location!r}: "
            "give the model as a path, not as bytes"
        )
    path = folder / location
    if Path(location).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"tensor {name!r} points outside the model's folder: {location!r}")
    if not path.is_file():
        raise ModelError(f"external data {location!r} of tensor {name!r} is missing")
    return path


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ModelError(f"tensor {name!r} has its data at offset {text!r}, expected a number")
    return int(text)


def _elements(tensor: onnx.TensorProto) -> int:
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} has shape {list(tensor.dims)}")
    return math.prod(tensor.dims)


def _size(tensor: onnx.TensorProto) -> int:
    """Bytes of the tensor in a file; strings, which have no size, count 0."""
    kind, elements = _type_name(tensor), _elements(tensor)
    if kind in ("?", "UNDEFINED"):
        raise ModelError(f"tensor {tensor.name!r} is of unknown type {tensor.data_type}")
    if kind in _PACKED:
        return -(-elements * _PACKED[kind] // 8)
    if kind == "STRING":
        return 0
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _type_name(tensor: onnx.TensorProto) -> str:
    known = {v: k for k, v in onnx.TensorProto.DataType.items()}
    return str(known.get(tensor.data_type, "?"))
