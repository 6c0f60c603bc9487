"""Reads a model from a path, bytes or a ModelProto, and brings it into one normal form.

Normal form: opset imports unique and complete, nodes sorted and named, Constant nodes turned into
constants, external data mapped into memory instead of read. Subgraphs stay as they are.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from qcompile.errors import ModelError
from qcompile.graph import MICROSOFT, Graph, Header, is_constant
from qcompile.qtypes import Array

Source = str | Path | bytes | onnx.ModelProto

_CONSTANT_VALUES = {"value_float": np.float32, "value_int": np.int64}
_CONSTANT_LISTS = {"value_floats": np.float32, "value_ints": np.int64}


def load(source: Source) -> Graph:
    """The graph of a model. Raises ModelError: not there, not ONNX, truncated, data missing."""
    model, folder = read(source)
    return from_proto(model, folder)


def read(source: Source) -> tuple[onnx.ModelProto, Path | None]:
    """The ModelProto, external data not loaded, and the folder that its external data is in."""
    if isinstance(source, onnx.ModelProto):
        return source, None
    if isinstance(source, bytes):
        return _parse(source, "the given bytes"), None
    path = Path(source)
    if not path.is_file():
        what = "is a folder, not an .onnx file" if path.is_dir() else "does not exist"
        raise ModelError(f"model {str(path)!r} {what}")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ModelError(f"model {str(path)!r} cannot be read: {e.strerror}") from e
    return _parse(data, repr(str(path))), path.parent


def _parse(data: bytes, what: str) -> onnx.ModelProto:
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as e:
        raise ModelError(
            f"{what} is not a readable ONNX model ({len(data)} bytes): not ONNX, or truncated"
        ) from e
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError(f"{what} is not an ONNX model: no graph in it ({len(data)} bytes)")
    return model


def from_proto(model: onnx.ModelProto, folder: Path | None = None) -> Graph:
    """Normalise a ModelProto into a Graph; ``folder`` is where its external data lies.

    Raises ModelError where the model is malformed.
    """
    _check_inputs_exist(model.graph)
    inner = _import(_with_clean_imports(model))
    _map_external(inner, folder)
    _absorb_constant_nodes(inner)
    _name_nodes(inner)
    graph = Graph(inner, _header(model))
    graph.sort()
    return graph


def _header(model: onnx.ModelProto) -> Header:
    return Header(
        ir_version=int(model.ir_version),
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=int(model.model_version),
        doc_string=model.doc_string,
        metadata={p.key: p.value for p in model.metadata_props},
    )


def _with_clean_imports(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model (weights shared, not copied) with each domain imported once."""
    versions: dict[str, int] = {}
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        versions[domain] = max(versions.get(domain, 0), int(opset.version))
    used = {"" if n.domain == "ai.onnx" else n.domain for n in model.graph.node}
    if "" not in versions:
        # ONNX: version 1 where a model of the oldest format says nothing at all.
        versions[""] = 1 if not versions else onnx.defs.onnx_opset_version()
    if MICROSOFT in used:
        versions.setdefault(MICROSOFT, 1)
    wanted = [onnx.helper.make_opsetid(d, v) for d, v in versions.items()]
    if list(model.opset_import) != wanted:
        del model.opset_import[:]
        model.opset_import.extend(wanted)
    return model


def _import(model: onnx.ModelProto) -> gs.Graph:
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    try:
        return gs.import_onnx(model)
    except ModelError:
        raise
    except Exception as e:  # graphsurgeon raises whatever it meets
        raise ModelError(f"the model's graph cannot be read: {type(e).__name__}: {e}") from e


def _check_inputs_exist(graph: onnx.GraphProto) -> None:
    """Each tensor is made once, and before it is used by some node, input or initializer."""
    known = {t.name for t in graph.input} | {t.name for t in graph.initializer}
    known |= {t.values.name for t in graph.sparse_initializer}
    made: set[str] = set()
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made or name in known:
                raise ModelError(f"tensor {name!r} is made twice, again by node {node.name!r}")
            made.add(name)
    known |= made
    for node in graph.node:
        missing = [name for name in node.input if name and name not in known]
        if missing:
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) reads tensor {missing[0]!r}, "
                "which nothing produces"
            )
    for output in graph.output:
        if output.name not in known:
            raise ModelError(f"graph output {output.name!r} is produced by nothing")


def _absorb_constant_nodes(inner: gs.Graph) -> None:
    """Constant nodes of the main graph become constants; those in subgraphs stay."""
    visible = {t.name for t in inner.outputs}
    kept = []
    for node in inner.nodes:
        values = None if node.op != "Constant" or node.domain else _constant_value(node)
        if values is None or node.outputs[0].name in visible:
            kept.append(node)
            continue
        out = node.outputs[0]
        node.outputs.clear()
        out.to_constant(values) if isinstance(values, np.ndarray) else _adopt(out, values)
    inner.nodes[:] = kept


def _adopt(tensor: gs.Variable, constant: gs.Constant) -> None:
    """Make ``tensor`` the constant, keeping its values lazy."""
    tensor.to_constant(constant._values)
    tensor.data_location = constant.data_location
    if isinstance(constant._values, gs.ir.tensor.LazyValues):
        constant._values.tensor.name = tensor.name


def _constant_value(node: gs.Node) -> Array | gs.Constant | None:
    for key, value in node.attrs.items():
        if key == "value" and is_constant(value):
            return None if isinstance(value._values, gs.ir.tensor.SparseValues) else value
        if key in _CONSTANT_VALUES:
            return np.array(value, _CONSTANT_VALUES[key])
        if key in _CONSTANT_LISTS:
            return np.array(value, _CONSTANT_LISTS[key])
    return None  # strings and sparse values stay nodes


def _name_nodes(inner: gs.Graph) -> None:
    """Unnamed and doubly named nodes get a name from their first output, stable across runs."""
    seen: set[str] = {n.name for n in inner.nodes if n.name}
    used: set[str] = set()
    for i, node in enumerate(inner.nodes):
        if node.name and node.name not in used:
            used.add(node.name)
            continue
        base = f"{node.op}:{node.outputs[0].name if node.outputs else i}"
        while base in seen:
            base += "_"
        node.name = base
        seen.add(base)
        used.add(base)


def _map_external(inner: gs.Graph, folder: Path | None) -> None:
    for tensor in inner.tensors().values():
        values = getattr(tensor, "_values", None)
        proto = getattr(values, "tensor", None)
        if isinstance(proto, onnx.TensorProto) and proto.data_location == onnx.TensorProto.EXTERNAL:
            tensor._values = _mapped(proto, folder)
            tensor.data_location = None


def _mapped(proto: onnx.TensorProto, folder: Path | None) -> Array:
    """External data as a read-only memory map; it must lie inside the model's folder."""
    info = {entry.key: entry.value for entry in proto.external_data}
    location = info.get("location", "")
    if folder is None:
        raise ModelError(
            f"tensor {proto.name!r} has its data in file {location!r}: "
            "give the model as a path, not as bytes"
        )
    parts = PurePosixPath(location)
    path = folder / location
    if parts.is_absolute() or ".." in parts.parts or path.is_symlink():
        raise ModelError(f"tensor {proto.name!r} points outside the model's folder: {location!r}")
    if not path.is_file():
        raise ModelError(f"external data {location!r} of tensor {proto.name!r} is missing")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    size = int(np.prod(proto.dims, dtype=np.int64)) * dtype.itemsize
    offset = int(info.get("offset", 0))
    if offset < 0 or offset + size > path.stat().st_size:
        raise ModelError(
            f"external data {location!r} is too short for tensor {proto.name!r}: "
            f"{path.stat().st_size} bytes, {offset + size} needed"
        )
    if size == 0:
        return np.zeros(tuple(proto.dims), dtype)
    raw = np.memmap(path, np.uint8, "r", offset=offset, shape=(size,))
    return raw.view(dtype).reshape(tuple(proto.dims))
