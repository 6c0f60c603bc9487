"""Reads, checks and parses a model from a path, bytes or a ModelProto."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from qcompile.errors import ModelError
from qcompile.ir import Graph
from qcompile.ir.model_io.external_data import (
    Storage,
    embed,
    embed_external,
    external_file,
    inner_tensors,
    is_external,
)
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.size_limits import PROTOBUF_LIMIT, check_entries
from qcompile.ir.model_io.weightless_parse import Span, UnusualError, thin
from qcompile.system.memory_map import MappedFile

Source = str | Path | bytes | onnx.ModelProto


def load(source: Source) -> Graph:
    """The graph of a model. Raises ModelError: missing, not ONNX, truncated, data missing."""
    return from_proto(*read_model(source))


def read_model(source: Source) -> tuple[onnx.ModelProto, Storage]:
    """The ModelProto without large weights that are in files, and where those are."""
    if isinstance(source, onnx.ModelProto):
        own = onnx.ModelProto()
        own.CopyFrom(source)  # ``from_proto`` modifies it
        return own, Storage()
    if isinstance(source, bytes):
        return _parse(source, "the given bytes"), Storage()
    path = Path(source)
    if not path.is_file():
        what = "is a folder, not an .onnx file" if path.is_dir() else "does not exist"
        raise ModelError(f"model {str(path)!r} {what}")
    try:
        file = MappedFile(path)
    except OSError as e:
        raise ModelError(f"model {str(path)!r} cannot be read: {e.strerror}") from e
    return _read(file, path)


def _read(file: MappedFile, path: Path) -> tuple[onnx.ModelProto, Storage]:
    what = repr(str(path))
    try:
        thinned = thin(file.data)
    except UnusualError:
        return _parse(file.data[:], what), Storage(path.parent)
    model = _parse(thinned.model, what, file.size)
    graph, spans = model.graph, dict[str, Span]()
    for i, span in thinned.initializers.items():
        spans[graph.initializer[i].name] = span
    for (i, j), span in thinned.attributes.items():
        node = graph.node[i]
        if node.op_type == "Constant" and len(node.output) == 1 and not node.domain:
            spans[node.output[0]] = span
        else:
            embed(node.attribute[j].t, file, span)
    return model, Storage(path.parent, file, spans)


def _parse(data: bytes, what: str, size: int = 0) -> onnx.ModelProto:
    check_entries(data, what)
    size = size or len(data)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as e:
        raise ModelError(
            f"{what} is not a readable ONNX model ({size} bytes): not ONNX, or truncated"
        ) from e
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError(f"{what} is not an ONNX model: no graph in it ({size} bytes)")
    return model


def runnable(model: Source) -> bytes | Path:
    """The model as ONNX Runtime loads it: a path stays a path, so that external data is found."""
    if isinstance(model, onnx.ModelProto):
        data: bytes = model.SerializeToString()
        return data
    return model if isinstance(model, bytes) else Path(model)


def embedded(source: Source) -> bytes:
    """The model in one message, with its weights.

    Raises ModelError where those cannot be read, or do not fit protobuf's limit.
    """
    model, storage = read_model(source)
    embed_inner(model, storage)
    for tensor in model.graph.initializer:
        if tensor.name in storage.spans and storage.own is not None:
            embed(tensor, storage.own, storage.spans[tensor.name])
        elif is_external(tensor):
            embed_external(tensor, storage)
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise ModelError(f"the model has {model.ByteSize()} bytes, over protobuf's 2 GiB limit")
    data: bytes = model.SerializeToString()
    return data


def external_files(model: onnx.ModelProto, storage: Storage) -> tuple[Path, ...]:
    """External data files of the model, sorted; ``from_proto`` reports those that are invalid."""
    tensors = (*model.graph.initializer, *inner_tensors(model))
    found = {external_file(t, storage) for t in tensors if is_external(t)}
    return tuple(sorted(path for path in found if path is not None))


def embed_inner(model: onnx.ModelProto, storage: Storage) -> None:
    """Read the data of all tensors but initializers into the ModelProto."""
    for tensor in inner_tensors(model):
        if is_external(tensor):
            embed_external(tensor, storage)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in storage.spans:
            assert storage.own is not None
            value = next(a.t for a in node.attribute if a.name == "value")
            embed(value, storage.own, storage.spans[node.output[0]])
