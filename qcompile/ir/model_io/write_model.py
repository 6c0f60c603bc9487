"""Writes a graph to files, constant by constant: the weights are never in memory together.

One protobuf file; two where that exceeds protobuf's limit of 2 GiB, or where the runtime is to map
the weights. The second holds the data of large constants as ONNX external data, at page-aligned
offsets.
Source: https://protobuf.dev/programming-guides/encoding, and onnx/onnx docs/ExternalData.md
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx

from qcompile.errors import ModelError, OutputError
from qcompile.ir import Constant, Graph, array
from qcompile.ir.lazy_values import nbytes, stored_proto, values_of
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.external_data import (
    Storage,
    external_file,
    is_external,
    is_packed,
    is_whole,
    mapped,
)
from qcompile.ir.model_io.node_proto import element_type, fill_tensor
from qcompile.ir.model_io.size_limits import PROTOBUF_LIMIT
from qcompile.ir.model_io.to_proto import shell
from qcompile.ir.model_io.weightless_parse import varint
from qcompile.quant import Array
from qcompile.system import atomic_write, digests
from qcompile.system.temporary_folder import TemporaryFolder

_LEAST = 1 << 10  # bytes of a constant whose data is streamed
_PAGE = 1 << 12
_GRAPH, _INITIALIZER, _RAW_DATA, _DELIMITED = 7, 5, 9, 2  # field numbers, and a wire type
_DATA = "data"
_DIGITS = 12
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ModelFiles:
    """A model in a temporary folder, which lives as long as this object: model and data file."""

    path: Path
    data: Path | None
    folder: TemporaryFolder

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(p.stat().st_size for p in (self.path, self.data) if p is not None)

    def save(self, path: Path) -> None:
        """Copy to ``path`` atomically, replacing any model there.

        The data file goes to the same folder under its own name: it is written before the model
        that names it, and that of the replaced model is removed last. Raises OutputError.
        """
        place = atomic_write.destination(path)
        old = data_file_of(place)
        if self.data is None:
            _copy(self.path, place)
        else:
            data = place.with_name(self.data.name)
            is_new = not data.exists()
            try:
                _copy(self.data, data)
                _copy(self.path, place)
            except BaseException:
                if is_new:
                    data.unlink(missing_ok=True)
                raise
        if old is not None and (self.data is None or old.name != self.data.name):
            old.unlink(missing_ok=True)


def data_file_of(path: Path) -> Path | None:
    """The data file that ``write_model`` made for the model at a path, None where there is none."""
    try:
        model, storage = read_model.read_model(path)
    except ModelError:
        return None
    tensors = (t for t in model.graph.initializer if is_external(t))
    found = {external_file(t, storage) for t in tensors}
    ours = re.compile(rf"{re.escape(path.stem)}-[0-9a-f]{{{_DIGITS}}}\.data")
    return next((f for f in found if f is not None and ours.fullmatch(f.name)), None)


def _copy(source: Path, path: Path) -> None:
    with source.open("rb") as file, atomic_write.replacing(path) as target:
        shutil.copyfileobj(file, target, _CHUNK)


@dataclass(frozen=True)
class Piece:
    """A constant: its message, and a function for the data that the message does not hold."""

    message: onnx.TensorProto
    values: Callable[[], Array] | None = None
    size: int = 0

    @property
    def head(self) -> bytes:
        """The message up to the data."""
        message: bytes = self.message.SerializeToString(deterministic=True)
        return message + (_head(_RAW_DATA, self.size) if self.values else b"")


def write_model(graph: Graph, stem: str = "model", limit: int | None = None) -> ModelFiles:
    """The model as files in a temporary folder, deterministic.

    One file, ``<stem>.onnx``. If it would exceed ``limit``, by default protobuf's, also a data
    file, named after its contents, so that a model never gets the data of another. Raises
    OutputError where there is no room.
    """
    folder = TemporaryFolder()
    path, model = folder.path / f"{stem}.onnx", shell(graph)
    pieces = [_piece(c) for c in graph.constants().values()]
    with _room(folder):
        size = model.ByteSize() + sum(len(p.head) + p.size for p in pieces)
        if size <= (limit or PROTOBUF_LIMIT):
            with path.open("wb") as file:
                _write_whole(file, model, pieces)
            return ModelFiles(path, None, folder)
        unnamed = folder.path / _DATA
        write_data(unnamed, model, pieces)
        data = unnamed.rename(folder.path / f"{stem}-{digests.file_digest(unnamed)[:_DIGITS]}.data")
        for entry in (e for t in model.graph.initializer for e in t.external_data):
            if entry.key == "location":
                entry.value = data.name
        path.write_bytes(model.SerializeToString(deterministic=True))
    return ModelFiles(path, data, folder)


def with_external_weights(graph: Graph) -> tuple[onnx.ModelProto, TemporaryFolder]:
    """The model with its data in a file of a temporary folder, where it must be saved too.

    The runtime maps that file when it loads the model, so the weights are in memory only once, as
    it packs them. Raises OutputError where there is no room.
    """
    folder, model = TemporaryFolder(), shell(graph)
    with _room(folder):
        write_data(folder.path / _DATA, model, map(_piece, graph.constants().values()))
    return model, folder


def externalize_weights(source: Path) -> ModelFiles | None:
    """A copy of a model file with external weights, None where it holds no large weights.

    Raises OutputError where there is no room.
    """
    model, storage = read_model.read_model(source)
    return _external_copy(model, storage) if storage.spans else None


def edited_copy(source: bytes | Path, edit: Callable[[onnx.GraphProto], None]) -> ModelFiles:
    """A copy of a model with external weights and an edited graph; ``edit`` leaves weights alone.

    Raises ModelError where it cannot be read, OutputError where there is no room.
    """
    model, storage = read_model.read_model(source)
    edit(model.graph)
    return _external_copy(model, storage)


def _external_copy(model: onnx.ModelProto, storage: Storage) -> ModelFiles:
    """The model in a temporary folder, its weights in a file of their own."""
    read_model.embed_inner(model, storage)
    tensors = [onnx.TensorProto.FromString(t.SerializeToString()) for t in model.graph.initializer]
    del model.graph.initializer[:]
    folder = TemporaryFolder()
    with _room(folder):
        pieces = (_stored(t, storage) for t in tensors)
        write_data(folder.path / _DATA, model, pieces)
    return ModelFiles(save_proto(model, folder), folder.path / _DATA, folder)


def _stored(tensor: onnx.TensorProto, storage: Storage) -> Piece:
    """A constant of a loaded model."""
    if not is_external(tensor) and tensor.name not in storage.spans:
        return Piece(tensor)
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    values = mapped(tensor.name, copy, storage)
    if values is not None:
        return Piece(values.tensor, values.load, values.nbytes)
    if not is_packed(copy.data_type):
        return Piece(copy)
    raw = np.frombuffer(copy.raw_data, np.uint8)  # it was read into the copy
    copy.ClearField("raw_data")
    return Piece(copy, lambda: raw, raw.nbytes)


def save_proto(model: onnx.ModelProto, folder: TemporaryFolder) -> Path:
    """Write a model into the folder of its data. Raises OutputError where there is no room."""
    path = folder.path / "model.onnx"
    with _room(folder):
        path.write_bytes(model.SerializeToString())
    return path


def write_data(path: Path, model: onnx.ModelProto, pieces: Iterable[Piece]) -> None:
    """Write the data of constants, and add them to the model's initializers."""
    with path.open("wb") as file:
        for piece in pieces:
            target = model.graph.initializer.add()
            target.CopyFrom(piece.message)
            if piece.values is None:
                continue
            file.write(bytes(-file.tell() % _PAGE))
            target.data_location = onnx.TensorProto.EXTERNAL
            where = {"location": path.name, "offset": file.tell(), "length": piece.size}
            for key, value in where.items():
                target.external_data.add(key=key, value=str(value))
            file.write(_raw(piece.values()))


def _piece(constant: Constant) -> Piece:
    stored, size = stored_proto(constant), nbytes(constant)
    kind = element_type(constant.dtype) if stored is None else stored.data_type
    message = onnx.TensorProto()
    if size < _LEAST or not (is_whole(kind) or is_packed(kind)):
        fill_tensor(message, constant)
        return Piece(message)
    if stored is not None:
        message.metadata_props.extend(stored.metadata_props)
        if stored.doc_string:
            message.doc_string = stored.doc_string
    message.name, message.data_type = constant.name, kind
    message.dims.extend(constant.shape)
    return Piece(message, lambda: _in_file(constant, kind), size)


def _in_file(constant: Constant, kind: int) -> Array:
    """The values as a file has them: of types of few bits, several in a byte."""
    if not is_packed(kind):
        return array(constant)
    tensor = onnx.numpy_helper.from_array(values_of(constant))
    return np.frombuffer(tensor.raw_data, np.uint8)


def _write_whole(file: IO[bytes], model: onnx.ModelProto, pieces: list[Piece]) -> None:
    """Write the bytes that protobuf would, initializer by initializer."""
    before, after = _around(model, _GRAPH)
    first, last = _around(model.graph, _INITIALIZER)
    sizes = [len(p.head) + p.size for p in pieces]
    inner = sum(len(_head(_INITIALIZER, size)) + size for size in sizes)
    file.write(before + _head(_GRAPH, len(first) + inner + len(last)) + first)
    for piece, size in zip(pieces, sizes, strict=True):
        file.write(_head(_INITIALIZER, size) + piece.head)
        if piece.values is not None:
            file.write(_raw(piece.values()))
    file.write(last + after)


def _around(message: Any, number: int) -> tuple[bytes, bytes]:
    """A message's bytes of fields below a number, and of those above."""
    parts = type(message)(), type(message)()
    for part in parts:
        part.CopyFrom(message)
    for entry, _ in message.ListFields():
        for part, drop in zip(parts, (entry.number >= number, entry.number <= number), strict=True):
            if drop:
                part.ClearField(entry.name)
    before, after = (p.SerializeToString(deterministic=True) for p in parts)
    return before, after


def _head(number: int, size: int) -> bytes:
    return varint(number << 3 | _DELIMITED) + varint(size)


def _raw(values: Array) -> memoryview:
    """The bytes of an array; a view where it can be."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


@contextmanager
def _room(folder: TemporaryFolder) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        where = str(folder.path.parent)
        raise OutputError(f"temporary folder {where!r} (TMPDIR): {e.strerror}") from e
