"""Checked access to tensor data in the model file or in external data files, memory-mapped.

An external file must be in the model's folder, also after links are followed; in a snapshot of the
hub's cache, whose files are links to blobs, in its repository there. A file must contain the whole
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import onnx

from qcompile.errors import ModelError
from qcompile.ir.lazy_values import FileValues
from qcompile.ir.model_io.hub_cache import repository_around
from qcompile.ir.model_io.weightless_parse import Span
from qcompile.ir.subgraph import bodies
from qcompile.quant import Array
from qcompile.system.memory_map import MappedFile

_LARGEST = 1 << 48  # elements
_LONGEST_NUMBER = 19  # digits of 2^63
# Bits of element types of which a byte holds several: not mapped, since numpy does not pack.
_PACKED = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


@dataclass(frozen=True)
class Storage:
    """Where those values of a model are that its ModelProto does not hold.

    folder: of its external data, None where unknown. own: the model's file. ``spans``: positions of
    tensors' data in it, by tensor name.
    """

    folder: Path | None = None
    own: MappedFile | None = None
    spans: Mapping[str, Span] = field(default_factory=dict)
    _opened: dict[Path, MappedFile] = field(default_factory=dict)

    def open(self, path: Path) -> MappedFile:
        """An external data file, mapped once. Raises OSError."""
        if path not in self._opened:
            self._opened[path] = MappedFile(path)
        return self._opened[path]


def check_values(tensor: onnx.TensorProto) -> None:
    """Raises ModelError where the values in the model file do not fill the tensor's shape."""
    size, kind = data_size(tensor), _type_name(tensor.data_type)
    if tensor.HasField("raw_data"):
        found = len(tensor.raw_data)
    else:
        found = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
        if kind not in _PACKED:  # packed types have one byte per entry
            size = _elements(tensor) * (2 if kind.startswith("COMPLEX") else 1)
    if found != size:
        raise ModelError(_misfit(tensor, found, size))


def _misfit(tensor: onnx.TensorProto, found: int, expected: int) -> str:
    return (
        f"tensor {tensor.name!r} of shape {list(tensor.dims)} has {found} bytes or values, "
        f"expected {expected}"
    )


def is_external(tensor: onnx.TensorProto) -> bool:
    """True where the tensor's data is not in the model file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def external_file(tensor: onnx.TensorProto, storage: Storage) -> Path | None:
    """The file with a tensor's data; None where there is none, or it must not be read."""
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    try:
        return _path(tensor.name, location, storage.folder)
    except ModelError:
        return None


def is_whole(data_type: int) -> bool:
    """True for element types of whole bytes, which are the same in an array and in a file."""
    return _type_name(data_type) not in {*_PACKED, "STRING", "UNDEFINED", "?"}


def is_packed(data_type: int) -> bool:
    """True for element types of which a byte in a file holds several."""
    return _type_name(data_type) in _PACKED


def mapped(name: str, tensor: onnx.TensorProto, storage: Storage) -> FileValues | None:
    """Values of constant ``name`` in a file; None where they were read into ``tensor`` instead.

    Raises ModelError: folder unknown, file missing, too short or outside of the folder.
    """
    span = storage.spans.get(name)
    if span is None:
        file, offset = _external(tensor, storage)
    else:
        assert storage.own is not None  # spans are positions in it
        file, offset = storage.own, span.offset
        if span.size != data_size(tensor):
            raise ModelError(_misfit(tensor, span.size, data_size(tensor)))
    if not is_whole(tensor.data_type):
        _embed(tensor, file, offset)
        return None
    bare = onnx.TensorProto()
    bare.CopyFrom(tensor)
    del bare.external_data[:]
    bare.ClearField("data_location")
    return FileValues(bare, file, offset)


def values_of(tensor: onnx.TensorProto, storage: Storage) -> Array:
    """The values of an initializer, wherever they are. Raises ModelError as ``mapped`` does."""
    if is_external(tensor) or tensor.name in storage.spans:
        found = mapped(tensor.name, tensor, storage)
        if found is not None:
            return found.load()
    check_values(tensor)
    values: Array = onnx.numpy_helper.to_array(tensor)
    return values


def embed_external(tensor: onnx.TensorProto, storage: Storage) -> None:
    """Read external data into the tensor. Raises ModelError as ``mapped`` does."""
    _embed(tensor, *_external(tensor, storage))


def embed(tensor: onnx.TensorProto, file: MappedFile, span: Span) -> None:
    """Copy a tensor's data from the model's file back into its message."""
    tensor.raw_data = file.view(span.offset, span.size).tobytes()


def _embed(tensor: onnx.TensorProto, file: MappedFile, offset: int) -> None:
    raw = file.view(offset, data_size(tensor)).tobytes()
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.raw_data = raw


def _external(tensor: onnx.TensorProto, storage: Storage) -> tuple[MappedFile, int]:
    """File and offset of external data. Raises ModelError where it is not all there."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    if _type_name(tensor.data_type) == "STRING":
        raise ModelError(f"tensor {tensor.name!r} holds strings, which cannot be external")
    path = _path(tensor.name, info.get("location", ""), storage.folder)
    offset, size = _number(tensor.name, info.get("offset", "0")), data_size(tensor)
    try:
        file = storage.open(path)
    except OSError as e:
        raise ModelError(
            f"external data {path.name!r} of tensor {tensor.name!r} cannot be read: {e.strerror}"
        ) from e
    if offset + size > file.size:
        raise ModelError(
            f"external data {path.name!r} is too short for tensor {tensor.name!r}: "
            f"{file.size} bytes, {offset + size} needed"
        )
    return file, offset


def _path(name: str, location: str, folder: Path | None) -> Path:
    if folder is None:
        raise ModelError(
            f"tensor {name!r} has its data in file {location!r}: "
            "give the model as a path, not as bytes"
        )
    path = folder / location
    try:
        inside = _is_inside(path, location, folder)
        exists = path.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, too long, a zero byte
        raise ModelError(f"external data {location!r} of tensor {name!r} is not a file name") from e
    if Path(location).is_absolute() or not inside:
        raise ModelError(f"tensor {name!r} points outside the model's folder: {location!r}")
    if not exists:
        raise ModelError(f"external data {location!r} of tensor {name!r} is missing")
    return path


def _is_inside(path: Path, location: str, folder: Path) -> bool:
    real = path.resolve()
    if real.is_relative_to(folder.resolve()):
        return True
    repository = None if ".." in PurePath(location).parts else repository_around(folder)
    return repository is not None and real.is_relative_to(repository)


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > _LONGEST_NUMBER:
        raise ModelError(f"tensor {name!r} has its data at offset {text!r}, expected a number")
    return int(text)


def _elements(tensor: onnx.TensorProto) -> int:
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} has shape {list(tensor.dims)}")
    if math.prod(filter(None, tensor.dims)) > _LARGEST:  # a 0 among them would hide it
        raise ModelError(f"tensor {tensor.name!r} has shape {list(tensor.dims)}, which is absurd")
    return math.prod(tensor.dims)


def outside_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's data outside its message: external, or left out by ``thin``.

    Data that was left out counts with its tag and length in the model's file.
    """
    if is_external(tensor):
        return data_size(tensor)
    if tensor.HasField("raw_data") or not tensor.data_type:
        return 0
    if len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))):
        return 0
    size = data_size(tensor)
    return size and 1 + -(-size.bit_length() // 7) + size


def data_size(tensor: onnx.TensorProto) -> int:
    """Bytes of the tensor in a file; 0 for strings, which have no fixed size."""
    kind, elements = _type_name(tensor.data_type), _elements(tensor)
    if kind in ("?", "UNDEFINED"):
        raise ModelError(f"tensor {tensor.name!r} is of unknown type {tensor.data_type}")
    if kind in _PACKED:
        return -(-elements * _PACKED[kind] // 8)
    if kind == "STRING":
        return 0
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _type_name(data_type: int) -> str:
    known = {v: k for k, v in onnx.TensorProto.DataType.items()}
    return str(known.get(data_type, "?"))


def inner_tensors(
    model: onnx.ModelProto, excluded: Container[str] = ()
) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes, subgraphs and functions: all but the graph's initializers.

    ``excluded``: outputs of Constant nodes to leave out.
    """
    yield from _attribute_tensors(
        n for n in model.graph.node if n.op_type != "Constant" or n.output[0] not in excluded
    )
    for function in model.functions:
        yield from _attribute_tensors(function.node)


def _attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
        for body in bodies(node):
            yield from body.initializer
            yield from _attribute_tensors(body.node)


def external_bytes(model: onnx.ModelProto) -> int:
    """Bytes of constants outside the model's file."""
    return sum(outside_bytes(t) for t in model.graph.initializer if is_external(t))


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a constant in the model's file and in external files."""
    return int(tensor.ByteSize()) + outside_bytes(tensor)
